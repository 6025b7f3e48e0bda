"""Exported files: bytes, answers and latency in onnxruntime and OpenVINO.

python benchmarks/exports.py --model lite0 --toolkit nncf --budgets 0.02,0.05,0.1

`agreement` and `KL to torch` compare a file's answers with those of the quantized model
in torch that it was written from. Latencies are taken in turn, one batch of each file a
round: the fastest in milliseconds, and the median over the median of the quantized
network without adapters in its int8 export, in the same runtime.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from data import Task, load
from rich.console import Console
from rich.table import Table
from runtimes import RUNTIMES, outputs
from toolkits import ptq, quiet, run_flags, write_json
from torch import Tensor, nn

from cora_plugin.divergence import divergence

INT8 = "int8 ONNX"
BATCH = 16


@dataclass
class Row:
    """One file in one runtime; latencies in seconds by batch size."""

    adapters: str
    format: str
    path: Path
    runtime: str
    bytes: int = 0
    top1: float = 0.0
    agreement: float = 0.0
    kl_torch: float = 0.0
    kl_float: float = 0.0
    int8_layers: int = 0
    layers: int = 0
    fastest: dict[int, float] = field(default_factory=dict)
    median: dict[int, float] = field(default_factory=dict)


def main() -> None:
    """Run the benchmark that the arguments describe."""
    options = _options()
    torch.set_num_threads(options.threads)
    with quiet():
        task = load(options.model)
    console = Console(width=None if sys.stdout.isatty() else 150)
    reference = task.float_logits(task.test)
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for adapters, model, logits in _models(task, reference, options):
            for row in _files(task, adapters, model, Path(folder), options):
                with quiet():
                    _answers(row, task, reference, logits, options)
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
    task: Task, reference: Tensor, options: argparse.Namespace
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The float network, the quantized one, and that with adapters, with answers."""
    yield "float", task.net, reference
    toolkit = ptq(options.toolkit, task, options)
    with quiet():
        base = toolkit.quantize()
        logits = toolkit.logits(base, task.test)
    yield "none", base, logits
    for budget in options.budgets:
        model = copy.deepcopy(base)
        with quiet():
            toolkit.adapt(model, f"budget={budget},{options.cora}")
            logits = toolkit.logits(model, task.test)
        yield f"{budget:.0%}", model, logits


def _files(
    task: Task,
    adapters: str,
    model: nn.Module,
    folder: Path,
    options: argparse.Namespace,
) -> Iterator[Row]:
    formats = FORMATS["float" if adapters == "float" else options.toolkit]
    for name, (suffix, write) in formats.items():
        wanted = {"ONNX", INT8, *(options.formats or formats)}
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
                yield Row(adapters, name, path, runtime, size)


def _float(net: nn.Module, example: Tensor, path: Path) -> None:
    torch.onnx.export(
        net, (example,), path, dynamo=False, opset_version=17, **_free_batch()
    )


def _brevitas(**how: bool) -> Callable[[nn.Module, Tensor, Path], None]:
    def write(model: nn.Module, example: Tensor, path: Path) -> None:
        from cora_plugin.integrations.brevitas import export_onnx_qcdq

        export_onnx_qcdq(model, example, path, **how, **_free_batch())

    return write


def _nncf(name: str, **how: bool) -> Callable[[nn.Module, Tensor, Path], None]:
    def write(model: nn.Module, example: Tensor, path: Path) -> None:
        from cora_plugin.integrations import nncf

        getattr(nncf, name)(model, example, path, **how)

    return write


def _free_batch() -> dict[str, Any]:
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    return names | {"dynamic_axes": {"input": {0: "batch"}, "output": {0: "batch"}}}


FORMATS: dict[str, dict[str, tuple[str, Callable[[nn.Module, Tensor, Path], None]]]] = {
    "float": {"ONNX": (".onnx", _float)},
    "brevitas": {
        "QCDQ ONNX": (".onnx", _brevitas()),
        "packed ONNX": (".onnx", _brevitas(packed=True)),
        INT8: (".onnx", _brevitas(int8_kernels=True)),
    },
    "nncf": {
        "packed ONNX": (".onnx", _nncf("export_onnx")),
        INT8: (".onnx", _nncf("export_onnx", int8_kernels=True)),
        "packed IR": (".xml", _nncf("export_openvino")),
        "int8 IR": (".xml", _nncf("export_openvino", int8_kernels=True)),
    },
}
"""How to write each format of a toolkit: suffix and exporter."""


def _answers(
    row: Row,
    task: Task,
    reference: Tensor,
    expected: Tensor,
    options: argparse.Namespace,
) -> None:
    found = outputs(row.runtime, row.path, task.test, BATCH, options.threads)
    to_torch = divergence(expected, found)
    row.agreement, row.kl_torch = to_torch.agreement, to_torch.kl
    row.kl_float = divergence(reference, found).kl
    row.top1 = task.top1(found)
    session = RUNTIMES[row.runtime](row.path, task.test[:1], options.threads)
    row.int8_layers, row.layers = session.layers()


def _latencies(rows: list[Row], images: Tensor, options: argparse.Namespace) -> None:
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


def _table(rows: list[Row], options: argparse.Namespace) -> Table:
    weights = f"W{options.weight_bits}A{options.act_bits}"
    table = Table(title=f"{options.model} {weights}, {options.toolkit}")
    for heading in ("adapters", "format", "runtime"):
        table.add_column(heading)
    for heading in ("MB", "top-1", "agreement", "KL to torch", "KL to float", "int8"):
        table.add_column(heading, justify="right")
    for batch in options.batches:
        table.add_column(f"ms, {batch}", justify="right")
        table.add_column(f"ratio, {batch}", justify="right")
    bases = {r.runtime: r for r in rows if (r.adapters, r.format) == ("none", INT8)}
    for row in rows:
        cells = [row.adapters, row.format, row.runtime, f"{row.bytes / 1e6:.2f}"]
        cells += [f"{row.top1:.1%}", f"{row.agreement:.1%}", f"{row.kl_torch:.4f}"]
        cells += [f"{row.kl_float:.4f}", f"{row.int8_layers}/{row.layers}"]
        for batch in options.batches:
            ratio = row.median[batch] / bases[row.runtime].median[batch]
            cells += [f"{row.fastest[batch] * 1e3:.1f}", f"{ratio:.2f}"]
        table.add_row(*cells)
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(parser)
    names = {name for formats in FORMATS.values() for name in formats}
    parser.add_argument("--budgets", type=_numbers(float), default=[0.02, 0.05, 0.1])
    parser.add_argument(
        "--formats",
        type=lambda text: text.split(","),
        help=f"of {', '.join(sorted(names))}; the float and the int8 file always, the "
        "others by default",
    )
    parser.add_argument(
        "--cora",
        default="",
        help="settings beside the budget, as CoRaConfig reads them",
    )
    parser.add_argument("--batches", type=_numbers(int), default=[1, 16])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    def numbers(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return numbers


if __name__ == "__main__":
    main()
