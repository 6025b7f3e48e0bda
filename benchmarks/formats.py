"""What each export stores, in bytes, and whether its runtime answers as torch does.

python benchmarks/formats.py --model lite0

A model is exported as the toolkit quantized it and with adapters: what the files differ
by is what the adapters take. `agreement` is the share of images for which the runtime
gives the class that torch gives; qonnx's executor takes many minutes for it on a deep
network.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import load
from rich.console import Console
from rich.table import Table
from runtimes import outputs
from toolkits import network_flags, ptq_options, write_json
from torch import Tensor, nn

from cora_plugin.integrations.brevitas.layers import unpack
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT
from cora_plugin.integrations.toolkit import ADAPTERS
from cora_plugin.progress import quiet


def main() -> None:
    """Run the benchmark that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    network_flags(parser)
    parser.add_argument("--cora", default="budget=0.05", help="as CoRaConfig reads it")
    parser.add_argument(
        "--images", type=int, default=8, help="run through each file; 0: only sizes"
    )
    parser.add_argument("--json", type=Path, help="write what was measured here, too")
    options = parser.parse_args()

    with quiet():
        task = load(options.model)
        how = ptq_options(TOOLKIT, options)
        quantized = TOOLKIT.quantize(task.net, task.loader(), how)
        adapted = quantized.copied()
        report = TOOLKIT.adapt(adapted, options.cora)
        plain, model = quantized.model, adapted.model
    weights = sum(row.weights for row in report.layers)
    values = report.adapter_parameters
    x = task.test[: max(options.images, 1)]
    with torch.no_grad():
        expected = unpack(model(x)).argmax(1)

    title = f"{task.name}: {weights:,} weights, {values:,} values in adapters"
    table = Table("format", title=title)
    for heading in ("MB", "with adapters", "bytes a weight", "a value", "agreement"):
        table.add_column(heading, justify="right")
    files: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        for name, (format_, run) in FORMATS.items():
            export = TOOLKIT.exports[format_].write
            with quiet():
                sizes = [_exported(export, each, x, path) for each in (plain, model)]
                found: dict[str, Any] = {"bytes": sizes[0], "adapted_bytes": sizes[1]}
                agreement = ""
                if options.images:
                    same = run(path, x).argmax(1) == expected
                    found["agreement"] = float(same.float().mean())
                    agreement = f"{found['agreement']:.1%}"
            files.append({"format": f"export_{format_}", **found})
            table.add_row(
                name,
                f"{sizes[0] / 1e6:.2f}",
                f"{sizes[1] / 1e6:.2f}",
                f"{sizes[0] / weights:.2f}",
                f"{(sizes[1] - sizes[0]) / values:.2f}",
                agreement,
            )
        TOOLKIT.exports[ADAPTERS].write(model, x, path)
        size = path.stat().st_size
        table.add_row("save_cora", "", f"{size / 1e6:.2f}", "", f"{size / values:.2f}")
        files.append({"format": "save_cora", "adapted_bytes": size})
    Console().print(table)
    about = {"model": options.model, "weights": weights}
    write_json(options.json, {**about, "files": files})


def _exported(export: Any, model: nn.Module, x: Tensor, path: Path) -> int:
    export(model, x, path)
    return path.stat().st_size


def _onnxruntime(path: Path, x: Tensor) -> Tensor:
    return outputs("onnxruntime", path, x, len(x), torch.get_num_threads())


def _qonnx(path: Path, x: Tensor) -> Tensor:
    import onnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    # The executor makes models as new as the onnx package, which onnxruntime lags.
    onnx.IR_VERSION = 10
    model = cleanup_model(ModelWrapper(str(path)))
    (name,) = [each.name for each in model.graph.input]
    (answer,) = execute_onnx(model, {name: x.numpy()}).values()
    return torch.from_numpy(answer)


def _torchscript(path: Path, x: Tensor) -> Tensor:
    output: Tensor = torch.jit.load(path)(x)
    return output


FORMATS: dict[str, tuple[str, Callable[[Path, Tensor], Tensor]]] = {
    "ONNX QCDQ": ("onnx_qcdq", _onnxruntime),
    "QONNX": ("qonnx", _qonnx),
    "torch QCDQ": ("torch_qcdq", _torchscript),
}
"""Formats of the toolkit, and what runs each file."""


if __name__ == "__main__":
    main()
