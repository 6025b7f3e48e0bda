"""Exported files: bytes, answers and latency in onnxruntime and OpenVINO.

python benchmarks/exports.py --model lite0 --toolkit nncf --budgets 0.02,0.05,0.1

`agreement` and `KL to torch` compare a file's answers with those of the quantized model
in torch that it was written from; `torch to float` is that model's own KL, for `KL to
float` to be compared with. Latencies are taken in turn, one batch of each file a
round: the fastest in milliseconds, and the median over the median of the quantized
network without adapters in its int8 export, in the same runtime. What `--json` writes
for readme.py has both ratios, of medians and of fastest runs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from data import load
from rich.console import Console
from rich.table import Table
from runtimes import RUNTIMES, outputs
from toolkits import ptq_options, run_flags, weights, write_json
from torch import Tensor, nn

from cora_plugin.compare.rows import judge
from cora_plugin.compare.task import Task
from cora_plugin.integrations.toolkit import Toolkit, load_toolkit
from cora_plugin.progress import quiet

FLOAT = "float"
INT8 = "int8 ONNX"
BATCH = 16

Form = tuple[str, Callable[[nn.Module, Tensor, Path], None]]
"""How to write a file: its suffix and the exporter."""


@dataclass
class File:
    """One file in one runtime; latencies by batch size, in seconds and as ratios."""

    adapters: str
    format: str
    path: Path
    runtime: str
    bytes: int = 0
    top1: float = 0.0
    agreement: float = 0.0
    kl_torch: float = 0.0
    kl_of_torch: float = 0.0
    kl_float: float = 0.0
    int8_layers: int = 0
    layers: int = 0
    fastest: dict[int, float] = field(default_factory=dict)
    median: dict[int, float] = field(default_factory=dict)
    ratio: dict[int, float] = field(default_factory=dict)
    ratio_fastest: dict[int, float] = field(default_factory=dict)


def main() -> None:
    """Run the benchmark that the arguments describe."""
    options = _options()
    torch.set_num_threads(options.threads)
    with quiet():
        task = load(options.model)
    console = Console(width=None if sys.stdout.isatty() else 150)
    toolkit = load_toolkit(options.toolkit)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for adapters, model, expected in _models(task, toolkit, options):
            forms = (
                _forms(toolkit) if adapters != FLOAT else {"ONNX": (".onnx", _float)}
            )
            for row in _files(task, adapters, model, forms, Path(folder), options):
                with quiet():
                    _answers(row, task, expected, options)
                rows.append(row)
                console.print(
                    f"{row.adapters}, {row.format}, {row.runtime}: {row.bytes:,} bytes,"
                    f" KL to torch {row.kl_torch:.4f}, int8 layers {row.int8_layers} of"
                    f" {row.layers}",
                    highlight=False,
                )
        for batch in options.batches:
            with quiet():
                _latencies(rows, task.test[:batch], options)
    console.print(_table(rows, options))
    found = [asdict(row) | {"path": row.path.name} for row in rows]
    write_json(options.json, found)


def _models(
    task: Task, toolkit: Toolkit[Any], options: argparse.Namespace
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The float network, the quantized one, and that with adapters, with answers."""
    yield FLOAT, task.net, task.reference
    how = ptq_options(toolkit, options)
    with quiet():
        base = toolkit.quantize(task.net, task.loader(), how)
        outputs = toolkit.outputs(base.model, task.test)
    yield "none", base.model, outputs
    for budget in options.budgets:
        adapted = base.copied()
        with quiet():
            toolkit.adapt(adapted, f"budget={budget},{options.cora}")
            outputs = toolkit.outputs(adapted.model, task.test)
        yield f"{budget:.0%}", adapted.model, outputs


def _files(
    task: Task,
    adapters: str,
    model: nn.Module,
    forms: Mapping[str, Form],
    folder: Path,
    options: argparse.Namespace,
) -> Iterator[File]:
    for name, (suffix, write) in forms.items():
        wanted = {"ONNX", INT8, *(options.formats or forms)}
        if name not in wanted:
            continue
        path = folder / f"{adapters}-{name}{suffix}".replace(" ", "-").replace("%", "")
        with quiet():
            write(model, task.test[:1], path)
        size = path.stat().st_size
        if suffix == ".xml":
            size += path.with_suffix(".bin").stat().st_size
        for runtime in RUNTIMES:
            if suffix == ".onnx" or runtime == "openvino":
                yield File(adapters, name, path, runtime, size)


def _float(net: nn.Module, example: Tensor, path: Path) -> None:
    free = {0: "batch"}
    torch.onnx.export(
        net,
        (example,),
        path,
        dynamo=False,
        opset_version=17,
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": free, "output": free},
    )


def _forms(toolkit: Toolkit[Any]) -> dict[str, Form]:
    return {
        name: (export.suffix, partial(export.write, **how))
        for export in toolkit.exports.values()
        for name, how in export.forms.items()
    }


def _answers(
    row: File, task: Task, expected: Tensor, options: argparse.Namespace
) -> None:
    how = options.threads, options.as_written
    found = outputs(row.runtime, row.path, task.test, BATCH, *how)
    to_torch, to_float = judge(expected, found), task.judge(found)
    row.agreement, row.kl_torch = to_torch.agreement, to_torch.kl
    row.kl_float, row.top1 = to_float.kl, to_float.top1 or 0.0
    row.kl_of_torch = task.judge(expected).kl or 0.0
    session = RUNTIMES[row.runtime](row.path, task.test[:1], options.threads)
    row.int8_layers, row.layers = session.layers()


def _latencies(rows: list[File], images: Tensor, options: argparse.Namespace) -> None:
    batch = images.numpy()
    sessions = [RUNTIMES[r.runtime](r.path, images, options.threads) for r in rows]
    seconds: list[list[float]] = [[] for _ in rows]
    for session in sessions:
        session.run(batch)  # The first run allocates.
    for _ in range(options.rounds):
        for session, taken in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(batch)
            taken.append(time.perf_counter() - start)
    for row, taken in zip(rows, seconds, strict=True):
        row.fastest[len(images)] = min(taken)
        row.median[len(images)] = median(taken)
    bases = {r.runtime: r for r in rows if (r.adapters, r.format) == ("none", INT8)}
    size = len(images)
    for row in rows:
        base = bases[row.runtime]
        row.ratio[size] = row.median[size] / base.median[size]
        row.ratio_fastest[size] = row.fastest[size] / base.fastest[size]


def _table(rows: list[File], options: argparse.Namespace) -> Table:
    table = Table(title=f"{options.model} {weights(options)}, {options.toolkit}")
    for heading in ("adapters", "format", "runtime"):
        table.add_column(heading)
    for heading in ("MB", "top-1", "agreement", "KL to torch", "torch to float"):
        table.add_column(heading, justify="right")
    for heading in ("KL to float", "int8"):
        table.add_column(heading, justify="right")
    for batch in options.batches:
        table.add_column(f"ms, {batch}", justify="right")
        table.add_column(f"ratio, {batch}", justify="right")
    for row in rows:
        cells = [row.adapters, row.format, row.runtime, f"{row.bytes / 1e6:.2f}"]
        cells += [f"{row.top1:.1%}", f"{row.agreement:.1%}", f"{row.kl_torch:.4f}"]
        cells += [f"{row.kl_of_torch:.4f}", f"{row.kl_float:.4f}"]
        cells += [f"{row.int8_layers}/{row.layers}"]
        for batch in options.batches:
            cells += [f"{row.fastest[batch] * 1e3:.1f}", f"{row.ratio[batch]:.2f}"]
        table.add_row(*cells)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(parser)
    parser.add_argument("--budgets", type=_numbers(float), default=[0.02, 0.05, 0.1])
    parser.add_argument(
        "--formats",
        type=lambda text: text.split(","),
        help=f"of the toolkit's, such as packed ONNX; the float and the {INT8} file "
        "always, the others by default",
    )
    parser.add_argument(
        "--cora",
        default="",
        help="settings beside the budget, as CoRaConfig reads them",
    )
    parser.add_argument("--batches", type=_numbers(int), default=[1, 16])
    parser.add_argument(
        "--as-written",
        action="store_true",
        help="answers without int8 kernels, which saturate on CPUs without VNNI",
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return numbers


if __name__ == "__main__":
    main()
