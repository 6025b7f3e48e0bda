"""Searches, metrics and budgets against each other on the same quantized network.

python benchmarks/search.py --model lite0 --weight-bits 3 --depthwise-bits 8

Each row is one way to choose and fit adapters at one budget. "8 bits" are the layers
whose residual costs most of the loss, raised to 8 bits in place of adapters, for as
many bits as the default's adapters of that budget take; "8 bits+bc" are the same after
the toolkit's bias correction. A seed draws calibration images. Rows that `--json` holds
already are not run again.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from data import load
from rich.console import Console
from toolkits import ptq_options, run_flags, weights, write_json
from torch import Tensor

from cora_plugin import Report
from cora_plugin.adapters import quantize
from cora_plugin.compare.experiment import RAISED, raised
from cora_plugin.compare.rows import METHODS, NONE, SHORT, Row, settings, table
from cora_plugin.compare.task import Task
from cora_plugin.integrations.toolkit import Quantized, Toolkit, load_toolkit
from cora_plugin.outputs import joined, only
from cora_plugin.progress import quiet, timed

DEFAULT = SHORT["default"]
CORRECTED = f"{RAISED}+bc"

QUICK = ("svd uniform", "svd spectral", "qera-exact spectral", DEFAULT)


def main() -> None:
    """Run the benchmark that the arguments describe."""
    flags = _flags()
    toolkit = load_toolkit(flags.toolkit)
    console, rows = Console(), _earlier(flags.json)
    for seed in flags.seeds:
        with quiet():
            task = load(flags.model, seed)
            options = ptq_options(toolkit, flags)
            quantized = toolkit.quantize(task.net, task.loader(), options)
        for row in _rows(toolkit, quantized, task, flags, seed, rows):
            rows.append(row)
            console.print(
                f"{row.method} {row.budget}: KL {row.kl:.4f}, top-1 {row.top1:.1%}, "
                f"{row.equivalent_bits:.2f} bits, {row.seconds:.0f} s",
                highlight=False,
            )
            # Each time, for a long run may be cut short.
            write_json(flags.json, [each.to_dict() for each in rows])
    title = f"{flags.model} {weights(flags)} {flags.toolkit}"
    console.print(table(rows, {"method": "method", "budget": "budget"}, title))


def _earlier(path: Path | None) -> list[Row]:
    """The rows of a run that was cut short."""
    if path is None or not path.exists():
        return []
    return [Row.of(values) for values in json.loads(path.read_text())]


def _rows(
    toolkit: Toolkit[Any],
    quantized: Quantized[Any],
    task: Task,
    flags: Any,
    seed: int,
    earlier: Sequence[Row],
) -> Iterator[Row]:
    """The rows of a seed that are not there yet."""
    done = {
        (row.method, row.budget)
        for row in earlier
        if row.details.get("seed", 0) == seed
    }

    def row(
        method: str,
        budget: str,
        found: Tensor,
        bits: float,
        seconds: float = 0.0,
        iterations: int | None = None,
        **details: Any,
    ) -> Row:
        depthwise = flags.depthwise_bits or flags.weight_bits
        return task.judge(
            found,
            toolkit=flags.toolkit,
            weights=weights(flags),
            method=method,
            budget=budget,
            equivalent_bits=bits,
            iterations=iterations,
            seconds=seconds,
            details={
                "depthwise_bits": depthwise,
                "act_range": quantized.options.act_range,
                "seed": seed,
                **details,
            },
        )

    with quiet():
        plain = toolkit.outputs(quantized.model, task.test)
    first = (NONE, "") not in done
    for budget in flags.budgets:
        for method in flags.methods:
            if (method, budget) in done:
                continue
            config = {"budget": budget, "seed": seed, **settings(method)}
            if config.get("search") == "butterworth":
                config["butterworth"] = {"iterations": flags.iterations}
            adapted = quantized.copied()
            report, seconds = timed(None, "", toolkit.adapt, adapted, config)
            if first:
                yield row(NONE, "", plain, report.equivalent_bits_before)
                first = False
            with quiet():
                found = toolkit.outputs(adapted.model, task.test)
            yield row(
                method,
                budget,
                found,
                report.equivalent_bits,
                seconds,
                report.search_iterations + report.fit_iterations,
                search_seconds=report.seconds["search"],
                steps=[f"{s.name} {s.after.value:.4g}" for s in report.steps if s.kept],
            )
            if method == DEFAULT:
                peers = _at_8_bits(toolkit, quantized, task, report, flags)
                yield from (row(name, budget, *rest) for name, *rest in peers)


@torch.no_grad()
def _at_8_bits(
    toolkit: Toolkit[Any],
    quantized: Quantized[Any],
    task: Task,
    report: Report,
    flags: Any,
) -> Iterator[tuple[str, Tensor, float]]:
    """With the layers that `raised` names at 8 bits: outputs, and equivalent bits."""
    with quiet():
        host = toolkit.host(quantized.model, task.test[:1])
        names, bits = raised(host, report)
        values = {
            layer.name: quantize(layer.weight, 8).dequantize().to(layer.weight)
            for layer in host.layers
            if layer.name in names
        }
        with host.prepared(), host.acting(values):
            found = only(joined([host.run(x) for x in task.test.split(32)]))
    yield RAISED, found, bits
    options = ptq_options(toolkit, flags, layer_bits=dict.fromkeys(names, 8))
    with quiet():
        finer = toolkit.quantize(task.net, task.loader(), options)
        corrected = toolkit.correct_biases(finer)
        found = toolkit.outputs(corrected.model, task.test)
    yield CORRECTED, found, bits


def _flags() -> argparse.Namespace:
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
        "--seeds",
        type=lambda text: [int(seed) for seed in text.split(",")],
        default=[0],
        help="what draws calibration images and holds some out, with commas",
    )
    parser.add_argument(
        "--iterations", type=int, default=250, help="of the butterworth search"
    )
    flags = parser.parse_args()
    for method in flags.methods:
        if method not in METHODS:
            parser.error(f"{method!r} is none of {', '.join(METHODS)}")
    return flags


if __name__ == "__main__":
    main()
