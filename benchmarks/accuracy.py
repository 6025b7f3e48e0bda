"""Accuracy of quantized networks, with adapters and without, as a table and as JSON.

python benchmarks/accuracy.py --model lite0 --toolkit brevitas --budget 0.05
"""

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from data import Task, load
from rich.console import Console
from rich.table import Table
from toolkits import TOOLKITS, quiet
from torch import Tensor, nn

from cora_plugin.adapters.files import whole_file
from cora_plugin.divergence import divergence

METHODS: dict[str, dict[str, str]] = {
    "svd uniform": {"search": "uniform", "metric": "svd"},
    "qera-exact uniform": {"search": "uniform", "metric": "qera-exact"},
    "spectral": {"search": "spectral", "metric": "qera-exact"},
}
COLUMNS = ("recipe", "method", "top1", "agreement", "kl", "equivalent_bits", "seconds")


def main() -> None:
    """Run the benchmark that the arguments describe."""
    options = _options()
    with quiet():
        task = load(options.model)
    toolkit = TOOLKITS[options.toolkit]
    rows: list[dict[str, Any]] = []
    console = Console()
    reference = task.float_logits(task.test)

    def add(
        recipe: str, method: str, logits: Tensor, bits: float, seconds: float
    ) -> None:
        distance = divergence(reference, logits)
        rows.append(
            {
                "model": task.name,
                "toolkit": options.toolkit,
                "weights": f"W{options.weight_bits}A{options.act_bits}",
                "depthwise_bits": options.depthwise_bits,
                "recipe": recipe,
                "method": method,
                "top1": task.top1(logits),
                "agreement": distance.agreement,
                "kl": distance.kl,
                "equivalent_bits": bits,
                "seconds": seconds,
            }
        )
        console.print({key: rows[-1][key] for key in COLUMNS})

    add("float", "none", reference, 32.0, 0.0)
    with quiet():
        start = time.perf_counter()
        quantized = toolkit.quantize(task.net, task.loader(), options)
        ptq_seconds = time.perf_counter() - start
    for recipe in options.recipes:
        with quiet():
            start = time.perf_counter()
            base = toolkit.better(copy.deepcopy(quantized), task.loader(), recipe)
            seconds = ptq_seconds + time.perf_counter() - start
        bits = None
        results = []
        for method in options.methods:
            with quiet():
                model, start = copy.deepcopy(base), time.perf_counter()
                settings = {"budget": options.budget, **METHODS[method]}
                report = toolkit.adapt(model, task.loader(), settings)
                spent = time.perf_counter() - start
            bits = report.equivalent_bits_before
            results.append((method, model, report.equivalent_bits, spent))
        for method, model, here, spent in [("none", base, bits, seconds), *results]:
            _both(add, toolkit, task, recipe, method, model, here, spent)
    console.print(_table(rows))
    if options.json:
        with whole_file(options.json) as temporary:
            Path(temporary).write_text(json.dumps(rows, indent=2))


def _both(
    add: Any,
    toolkit: Any,
    task: Task,
    recipe: str,
    method: str,
    model: nn.Module,
    bits: float,
    seconds: float,
) -> None:
    """Add a model's row, and that of the model after bias correction."""
    with quiet():
        plain = toolkit.logits(model, task.test)
    add(recipe, method, plain, bits, seconds)
    with quiet():
        start = time.perf_counter()
        corrected = toolkit.correct_bias(copy.deepcopy(model), task.loader())
        spent = time.perf_counter() - start
        logits = toolkit.logits(corrected, task.test)
    add(f"{recipe}+bc", method, logits, bits, seconds + spent)


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = f"{first['model']}, {first['toolkit']}, {first['weights']}"
    if first["depthwise_bits"]:
        title += f", depthwise {first['depthwise_bits']} bits"
    table = Table("recipe", "method", title=title)
    for heading in ("top-1", "agreement", "KL", "bits/weight", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["recipe"],
            row["method"],
            f"{row['top1']:.1%}",
            f"{row['agreement']:.1%}",
            f"{row['kl']:.4f}",
            f"{row['equivalent_bits']:.3f}",
            f"{row['seconds']:.0f}",
        )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("lite0", "squeezenet", "fashion"))
    parser.add_argument("--toolkit", choices=sorted(TOOLKITS), default="brevitas")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--depthwise-bits", type=int)
    parser.add_argument("--equalize-iters", type=int, default=0)
    parser.add_argument("--budget", default="0.05", help="as CoRaConfig reads it")
    parser.add_argument("--recipes", type=_names, default=["ptq"], help="ptq,gptq")
    parser.add_argument("--methods", type=_names, default=list(METHODS))
    parser.add_argument("--json", type=Path)
    parser.set_defaults(model="lite0")
    options = parser.parse_args()
    for method in options.methods:
        if method not in METHODS:
            parser.error(f"--methods: {method!r} is none of {', '.join(METHODS)}")
    for recipe in options.recipes:
        known = TOOLKITS[options.toolkit].recipes
        if recipe not in known:
            parser.error(f"--recipes: {recipe!r} is none of {', '.join(known)}")
    return options


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    main()
