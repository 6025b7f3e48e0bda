"""Accuracy of quantized networks, with adapters and without, as a table and as JSON.

python benchmarks/accuracy.py --model lite0 --toolkit brevitas --budgets 0.05
"""

import argparse
from pathlib import Path
from typing import Any

from data import load
from rich.console import Console
from rich.table import Table
from toolkits import (
    METHODS,
    RAISED,
    RECIPES,
    Variant,
    network_flags,
    quiet,
    variants,
    write_json,
)
from torch import Tensor

from cora_plugin.divergence import divergence
from cora_plugin.integrations.ptq import host_package


def main() -> None:
    """Run the benchmark that the arguments describe."""
    options = _options()
    with quiet():
        task = load(options.model)
    console = Console()
    reference = task.float_logits(task.test)
    rows: list[dict[str, Any]] = []

    def add(toolkit: str, variant: Variant, logits: Tensor) -> None:
        distance = divergence(reference, logits)
        row = {
            "model": task.name,
            "toolkit": toolkit,
            "weights": f"W{options.weight_bits}A{options.act_bits}",
            "depthwise_bits": options.depthwise_bits or options.weight_bits,
            "recipe": variant.recipe,
            "method": variant.method,
            "budget": variant.budget,
            "top1": task.top1(logits),
            "agreement": distance.agreement,
            "kl": distance.kl,
            "equivalent_bits": variant.equivalent_bits,
            "seconds": variant.seconds,
        }
        rows.append(row)
        console.print(
            f"{toolkit} {variant.recipe}, {variant.method} {variant.budget}: "
            f"top-1 {row['top1']:.1%}, KL {row['kl']:.4f}",
            highlight=False,
        )

    add("torch", Variant("float", "none", "", task.net, 32.0, 0.0), reference)
    for name in options.toolkit:
        outputs = host_package(name).PTQ.logits
        for recipe in options.recipes or list(RECIPES[name])[:1]:
            if recipe not in RECIPES[name]:
                continue  # It is another toolkit's.
            for variant in variants(name, task, options, recipe):
                with quiet():
                    logits = outputs(variant.model, task.test)
                add(name, variant, logits)
    console.print(_table(rows))
    write_json(options.json, rows)


def _table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    title = f"{first['model']} {first['weights']}"
    table = Table("toolkit", "recipe", "adapters", "budget", title=title)
    for heading in ("top-1", "agreement", "KL", "bits", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["toolkit"],
            row["recipe"],
            row["method"],
            row["budget"],
            f"{row['top1']:.1%}",
            f"{row['agreement']:.1%}",
            f"{row['kl']:.4f}",
            f"{row['equivalent_bits']:.2f}",
            f"{row['seconds']:.0f}",
        )
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    network_flags(parser)
    parser.add_argument(
        "--toolkit", type=_one_of(RECIPES), default=["brevitas"], help="brevitas,nncf"
    )
    parser.add_argument(
        "--budgets",
        type=lambda text: text.split(","),
        default=["0.05"],
        help="separated by commas, each as CoRaConfig reads it",
    )
    known = [name for recipes in RECIPES.values() for name in recipes]
    parser.add_argument("--recipes", type=_one_of(known), help=f"of {', '.join(known)}")
    quick = ["svd uniform", "qera-exact spectral", "default"]
    parser.add_argument(
        "--methods",
        type=_one_of([*METHODS, RAISED]),
        default=quick,
        help=f"of {', '.join([*METHODS, RAISED])} (with default); "
        f"default: {', '.join(quick)}",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _one_of(known: Any) -> Any:
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
