"""Searches, metrics and budgets against each other on the same quantized network.

python benchmarks/search.py --model lite0 --weight-bits 3 --depthwise-bits 8

Each row is one way to choose and fit adapters at one budget. "8 bits" are the layers
whose residual costs most of the loss, raised to 8 bits in place of adapters, for as
many bits as the default's adapters of that budget take; "8 bits+bc" are the same after
the toolkit's bias correction. Rows that `--json` holds already are not run again.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from data import Task, load
from rich.console import Console
from rich.table import Table
from toolkits import (
    RAISED,
    host_of,
    ptq,
    quiet,
    raised,
    run_flags,
    timed,
    write_json,
)
from torch import Tensor, nn

from cora_plugin import Report
from cora_plugin.adapters import quantize
from cora_plugin.divergence import divergence, outputs
from cora_plugin.integrations.ptq import AbstractPTQ, host_package

METHODS: dict[str, dict[str, Any]] = {
    "svd uniform": {"search": "uniform", "metric": "svd"},
    "lqer uniform": {"search": "uniform", "metric": "lqer"},
    "qera-approx uniform": {"search": "uniform", "metric": "qera-approx"},
    "qera-exact uniform": {"search": "uniform", "metric": "qera-exact"},
    "rrr uniform": {"search": "uniform"},
    "svd spectral": {"metric": "svd"},
    "lqer spectral": {"metric": "lqer"},
    "qera-approx spectral": {"metric": "qera-approx"},
    "qera-exact spectral": {"metric": "qera-exact"},
    "rrr spectral": {},
    "8-bit adapters": {"adapter_bits": 8},
    "no bias correction": {"metric": "qera-exact", "bias_correction": "off"},
    "cascade": {"metric": "qera-exact", "bias_correction": "cascade"},
    "alternation": {"metric": "qera-exact", "alternations": 3},
    "fit model": {"fit": {"iterations": 100}},
    "fit layer": {"fit": {"iterations": 100, "scope": "layer"}},
    "svd butterworth": {"search": "butterworth", "metric": "svd"},
    "lqer butterworth": {"search": "butterworth", "metric": "lqer"},
    "qera-approx butterworth": {"search": "butterworth", "metric": "qera-approx"},
    "qera-exact butterworth": {"search": "butterworth", "metric": "qera-exact"},
    "rrr butterworth": {"search": "butterworth"},
}
"""Settings beside the budget; what is not said is the default."""

DEFAULT = "rrr spectral"
CORRECTED = f"{RAISED}+bc"

QUICK = ("svd uniform", "svd spectral", "qera-exact spectral", DEFAULT)


def main() -> None:
    """Run the benchmark that the arguments describe."""
    options = _options()
    with quiet():
        task = load(options.model)
    toolkit = ptq(options.toolkit, task, options)
    model, _ = timed(toolkit.quantize)
    console, rows = Console(), _earlier(options.json)
    for row in _rows(toolkit, model, task, options, rows):
        rows.append(row)
        console.print(
            f"{row['method']} {row['budget']}: KL {row['kl']:.4f}, top-1 "
            f"{row['top1']:.1%}, {row['equivalent_bits']:.2f} bits, "
            f"{row['seconds']:.0f} s",
            highlight=False,
        )
        write_json(options.json, rows)  # each time: a long run may be cut short
    title = f"{task.name} W{options.weight_bits}A{options.act_bits} {options.toolkit}"
    console.print(_table(title, rows))


def _earlier(path: Path | None) -> list[dict[str, Any]]:
    """The rows of a run that was cut short."""
    if path is None or not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def _rows(
    toolkit: AbstractPTQ,
    model: nn.Module,
    task: Task,
    options: Any,
    earlier: Sequence[Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    """The rows that are not there yet."""
    done = {(row["method"], row["budget"]) for row in earlier}
    reference = task.float_logits(task.test)

    def row(
        method: str, budget: Any, logits: Tensor, bits: float, seconds: float = 0
    ) -> dict[str, Any]:
        distance = divergence(reference, logits)
        return {
            "model": task.name,
            "toolkit": options.toolkit,
            "weights": f"W{options.weight_bits}A{options.act_bits}",
            "depthwise_bits": options.depthwise_bits or options.weight_bits,
            "act_range": options.act_range,
            "method": method,
            "budget": str(budget),
            "top1": task.top1(logits),
            "agreement": distance.agreement,
            "kl": distance.kl,
            "equivalent_bits": bits,
            "seconds": seconds,
        }

    with quiet():
        plain = toolkit.logits(model, task.test)
    first = ("none", "") not in done
    for budget in options.budgets:
        for method in options.methods:
            if (method, str(budget)) in done:
                continue
            config = {"budget": budget, **METHODS[method]}
            if METHODS[method].get("search") == "butterworth":
                config["butterworth"] = {"iterations": options.iterations}
            report, seconds = timed(toolkit.adapt, model, config)
            if first:
                yield row("none", "", plain, report.equivalent_bits_before)
                first = False
            with quiet():
                logits = toolkit.logits(model, task.test)
                host_package(options.toolkit).remove_cora(model)
            yield {
                **row(method, budget, logits, report.equivalent_bits, seconds),
                "search_seconds": report.seconds["search"],
                "iterations": report.search_iterations + report.fit_iterations,
                "steps": [f"{s.name} {s.after.kl:.4g}" for s in report.steps if s.kept],
            }
            if method == DEFAULT:
                yield from (
                    row(name, budget, logits, bits)
                    for name, logits, bits in _at_8_bits(model, task, report, options)
                )


@torch.no_grad()
def _at_8_bits(
    model: nn.Module, task: Task, report: Report, options: Any
) -> Iterator[tuple[str, Tensor, float]]:
    """With the layers that `raised` names at 8 bits: outputs, and equivalent bits."""
    with quiet():
        host = host_of(options.toolkit, model, task.test[:1])
        names, bits = raised(host, report)
        values = {
            layer.name: quantize(layer.weight, 8).dequantize().to(layer.weight)
            for layer in host.layers
            if layer.name in names
        }
        with host.prepared(), host.weights(values):
            logits = outputs(host, task.test.split(32))
    yield RAISED, logits, bits
    finer = dict.fromkeys(names, 8)
    toolkit = ptq(options.toolkit, task, options, layer_bits=finer)
    with quiet():
        corrected = toolkit.corrected(toolkit.quantize())
        logits = toolkit.logits(corrected, task.test)
    yield CORRECTED, logits, bits


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table("method", "budget", title=title)
    for heading in ("top-1", "agreement", "KL", "bits", "iterations", "seconds"):
        table.add_column(heading, justify="right")
    columns = {
        "top1": ".1%",
        "agreement": ".1%",
        "kl": ".4f",
        "equivalent_bits": ".2f",
        "iterations": "d",
        "seconds": ".0f",
    }
    for row in rows:
        # Of an earlier run not everything may be known.
        told = {**row, "iterations": row.get("iterations") or None}
        values = [(told.get(name), form) for name, form in columns.items()]
        cells = ["" if value is None else format(value, form) for value, form in values]
        table.add_row(row["method"], row["budget"], *cells)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    run_flags(parser)
    parser.add_argument(
        "--budgets",
        type=lambda text: text.split(","),
        default=["0.05"],
        help="separated by commas, as CoRaConfig reads them, for example 0.02,0.05,0.1",
    )
    parser.add_argument(
        "--methods",
        type=lambda text: list(METHODS) if text == "all" else text.split(","),
        default=list(QUICK),
        help=f"all, or of: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "--iterations", type=int, default=250, help="of the butterworth search"
    )
    options = parser.parse_args()
    for method in options.methods:
        if method not in METHODS:
            parser.error(f"{method!r} is none of {', '.join(METHODS)}")
    return options


if __name__ == "__main__":
    main()
