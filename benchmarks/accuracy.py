"""Accuracy of quantized networks, with adapters and without, as a table and as JSON.

python benchmarks/accuracy.py --model lite0 --toolkit brevitas --budgets 0.05
"""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data import load
from rich.console import Console
from toolkits import network_flags, ptq_options, weights, write_json

from cora_plugin.compare.experiment import RAISED, Arm, variants
from cora_plugin.compare.rows import METHODS, NONE, SHORT, Row, settings, table
from cora_plugin.integrations.toolkit import Toolkit, load_toolkit, toolkits
from cora_plugin.progress import quiet

NAMES = {
    "toolkit": "toolkit",
    "recipe": "recipe",
    "adapters": "method",
    "budget": "budget",
}
"""Columns of the table that say what a row is."""


def main() -> None:
    """Run the benchmark that the arguments describe."""
    flags = _flags()
    with quiet():
        task = load(flags.model)
    console = Console()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        console.print(
            f"{row.toolkit} {row.recipe}, {row.method} {row.budget}: "
            f"top-1 {row.top1:.1%}, KL {row.kl:.4f}",
            highlight=False,
        )

    about: dict[str, Any] = {
        "weights": weights(flags),
        "details": {"depthwise_bits": flags.depthwise_bits or flags.weight_bits},
    }
    plain = {"recipe": "float", "method": NONE, "budget": ""}
    figures = {"equivalent_bits": 32.0, "seconds": 0.0}
    add(task.judge(task.reference, toolkit="torch", **plain, **figures, **about))
    for name, recipes in flags.recipes.items():
        toolkit = load_toolkit(name)
        for recipe in recipes:
            options = ptq_options(toolkit, flags, **toolkit.recipes[recipe])
            arms = _arms(toolkit, flags)
            behind = toolkit.corrects_afterwards
            for variant in variants(toolkit, task, options, arms, recipe, behind):
                with quiet():
                    outputs = toolkit.outputs(variant.model, task.test)
                add(task.judge(outputs, toolkit=name, **variant.about, **about))
    console.print(table(rows, NAMES, f"{task.name} {weights(flags)}"))
    write_json(flags.json, [row.to_dict() for row in rows])


def _arms(toolkit: Toolkit[Any], flags: Any) -> list[Arm]:
    """Each method at each budget.

    Where the toolkit can correct biases behind adapters, it does so in rows of their
    own, and adapters come without a correction of theirs.
    """
    own = {"bias_correction": "off"} if toolkit.corrects_afterwards else {}
    raised = RAISED in flags.methods
    return [
        Arm(
            method,
            {"budget": budget, **settings(method), **own},
            budget,
            raised and method == "default",
        )
        for budget in flags.budgets
        for method in flags.methods
        if method != RAISED
    ]


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    network_flags(parser)
    known = toolkits()
    parser.add_argument(
        "--toolkit", type=_one_of(known), default=known[:1], help=",".join(known)
    )
    parser.add_argument(
        "--budgets",
        type=lambda text: text.split(","),
        default=["0.05"],
        help="separated by commas, each as CoRaConfig reads it",
    )
    parser.add_argument(
        "--recipes",
        type=lambda text: text.split(","),
        help="of the toolkits', such as ptq,gptq; default: the first of each",
    )
    quick = ["svd uniform", "qera-exact spectral", "default"]
    methods = [*SHORT, *METHODS, RAISED]
    parser.add_argument(
        "--methods",
        type=_one_of(methods),
        default=quick,
        help=f"of {', '.join(methods)} (with default); default: {', '.join(quick)}",
    )
    parser.add_argument("--json", type=Path)
    flags = parser.parse_args()
    known_recipes = {name: load_toolkit(name).recipes for name in flags.toolkit}
    wanted = flags.recipes
    for recipe in wanted or []:
        if not any(recipe in recipes for recipes in known_recipes.values()):
            names = {each for recipes in known_recipes.values() for each in recipes}
            parser.error(f"{recipe!r} is none of {', '.join(sorted(names))}")
    flags.recipes = {  # By toolkit; what is another's is left out.
        name: [*recipes][:1] if wanted is None else [r for r in wanted if r in recipes]
        for name, recipes in known_recipes.items()
    }
    return flags


def _one_of(known: Collection[str]) -> Any:
    """Read names, separated by commas, each one of the known."""

    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is none of {', '.join(known)}"
                )
        return found

    return names


if __name__ == "__main__":
    main()
