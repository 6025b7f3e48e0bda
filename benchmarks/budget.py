"""Bit widths and adapters in one budget of all that is stored, beside their parts.

python benchmarks/budget.py --model lite0 --toolkit brevitas --times 1.0,1.05

Budgets are multiples of what plain PTQ stores. Rows: PTQ, with bias correction, too;
`bits`: widths of the menu alone; `adapters`: at the toolkit's widths, and `8 bits`, the
most sensitive layers in their place; `series`: a whole term for every layer, whatever
the budget; `together`: widths and adapters. Peers of a size of their own come last, as
`--peers` names them: other recipes, and `one up`, a bit more for every weight. A seed
draws calibration images.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from accuracy import NAMES
from data import load
from rich.console import Console
from toolkits import ptq_options, run_flags, weights, write_json

from cora_plugin.compare.experiment import Arm, Variant, variants
from cora_plugin.compare.rows import Row, table
from cora_plugin.compare.task import Task
from cora_plugin.integrations.toolkit import Toolkit, load_toolkit
from cora_plugin.progress import quiet

METHODS = ("bits", "adapters", "series", "together")

ONE_UP = "one up"


def main() -> None:
    """Run the benchmark that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(parser)
    parser.add_argument("--times", default="1.0,1.05", help="budgets, with commas")
    parser.add_argument("--menu", default="3/4/5/6/8", help="bit widths, with slashes")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas")
    parser.add_argument("--recipe", default="ptq", help="one of the toolkit's")
    parser.add_argument("--seeds", default="0", help="of calibration, with commas")
    parser.add_argument("--peers", default=ONE_UP, help="with commas")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    flags = parser.parse_args()
    toolkit = load_toolkit(flags.toolkit)
    rows: list[Row] = []
    console = Console()
    for seed in map(int, flags.seeds.split(",")):
        with quiet():
            task = load(flags.model, seed)
            task.net.to(flags.device)
        for variant in _variants(toolkit, task, flags, seed):
            with quiet():
                outputs = toolkit.outputs(variant.model, task.test)
            about = {"toolkit": toolkit.name, "weights": weights(flags)}
            details = {"seed": seed}
            rows.append(task.judge(outputs, **about, **variant.about, details=details))
            console.print(
                f"{variant.recipe}, {variant.method} {variant.budget}: "
                f"{variant.equivalent_bits:.3f} bits, KL {rows[-1].kl:.4f}",
                highlight=False,
            )
            write_json(flags.json, [row.to_dict() for row in rows])
    console.print(table(rows, NAMES, f"{flags.model} {weights(flags)}"))


def _variants(
    toolkit: Toolkit[Any], task: Task, flags: Any, seed: int
) -> Iterator[Variant]:
    """What is compared, by the budgets, then what has a size of its own."""
    options = ptq_options(toolkit, flags, **toolkit.recipes[flags.recipe])
    arms = [
        arm
        for number, times in enumerate(flags.times.split(","))
        for method in filter(None, flags.methods.split(","))
        # Of one size, whatever the budget.
        if method != "series" or not number
        for arm in _arms(method, float(times), flags.menu, seed)
    ]
    yield from variants(toolkit, task, options, arms, flags.recipe)
    for peer in filter(None, flags.peers.split(",")):
        if peer == ONE_UP:
            given = replace(options, weight_bits=options.weight_bits + 1)
        else:
            given = ptq_options(toolkit, flags, **toolkit.recipes[peer])
        yield from variants(toolkit, task, given, (), peer)


def _arms(method: str, times: float, menu: str, seed: int) -> list[Arm]:
    budget = f"{times} ptq"
    config = {"budget": budget, "seed": seed}
    if method == "adapters":
        # At once what is stored, adapters have nothing to spend.
        return [Arm(method, config, budget, raised=True)] if times > 1 else []
    if method == "series":
        return [Arm(method, {"search": "series", "adapter_bits": 2, "seed": seed})]
    config["menu"] = menu
    if method == "bits":
        config["ranks"] = {"*": 0}
    return [Arm(method, config, budget)]


if __name__ == "__main__":
    main()
