"""Loads a file that was written, runs the example, and compares with torch."""

import logging
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cora_plugin.adapters.errors import ModelError
from cora_plugin.integrations.example import Example

log = logging.getLogger(__name__)

FAR = 0.1
"""A difference of this share of the largest output is more than rounding explains."""

RUNS_ALL = 1, 28
"""The oldest onnxruntime that runs every file. Before, its optimizer lost the type of
4-bit weights that are reshaped, and wanted one zero point for all channels."""


def check_onnx(
    path: str | os.PathLike[str], example: Example, names: Sequence[str]
) -> float:
    """Run an ONNX file in onnxruntime, with its default optimizations.

    Args:
        path: The file.
        example: What the model was traced with, and its outputs.
        names: Names of the inputs.

    Returns:
        The largest difference from torch.

    Raises:
        ModelError: onnxruntime refuses the file.
    """
    import onnxruntime

    levels = onnxruntime.GraphOptimizationLevel

    def run(level: Any = levels.ORT_ENABLE_ALL) -> list[Any]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
        given = dict(zip(names, example.inputs, strict=False))
        wanted = [each.name for each in session.get_inputs()]
        if not given.keys() >= {*wanted}:  # The exporter has named them.
            given = dict(zip(wanted, example.inputs, strict=False))
        feeds = {name: given[name].cpu().numpy() for name in wanted}
        return list(session.run(None, feeds))

    return _compared("onnxruntime", run, example, lambda: run(levels.ORT_ENABLE_BASIC))


def check_openvino(path: str | os.PathLike[str], example: Example) -> float:
    """Run OpenVINO IR on the CPU, in float32 where it may choose.

    Returns:
        The largest difference from torch.

    Raises:
        ModelError: OpenVINO refuses the file.
    """
    import openvino

    def run() -> list[Any]:
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(os.fspath(path), "CPU", hint)
        inputs = [value.cpu().numpy() for value in example.inputs]
        return list(compiled(inputs).values())

    return _compared("OpenVINO", run, example)


def check_torchscript(
    load: Callable[[], Any], example: Example, unpack: Callable[[Any], Any]
) -> float:
    """Run TorchScript; the largest difference from the model itself.

    Raises:
        ModelError: It does not run.
    """

    def run() -> list[Any]:
        answer = unpack(load()(*example.args))
        found = answer if isinstance(answer, tuple | list) else [answer]
        return [value.numpy() for value in found]

    return _compared("torch.jit", run, example)


def wanted(check: bool | None, package: str) -> bool:
    """Whether to check a file: by default where the package is installed."""
    return find_spec(package) is not None if check is None else check


def runs_all() -> bool:
    """Whether the onnxruntime that is installed runs every file."""
    release = version("onnxruntime").split(".")
    return (int(release[0]), int(release[1])) >= RUNS_ALL


def _newer(runtime: str) -> str:
    """A way out where the runtime is too old for some files."""
    if runtime != "onnxruntime" or runs_all():
        return ""
    newer = ".".join(map(str, RUNS_ALL))
    return f"use onnxruntime {newer} or newer (Python 3.11 or newer), or "


def _compared(
    runtime: str,
    run: Callable[[], list[Any]],
    example: Example,
    plainly: Callable[[], list[Any]] | None = None,
) -> float:
    """The largest difference; a warning where it is more than rounding explains.

    Args:
        runtime: Its name.
        run: Gives its answers.
        example: What torch gives.
        plainly: Gives them without kernels that the runtime fuses by itself.
    """
    try:
        with torch.no_grad():
            answers = run()
    except Exception as error:
        raise ModelError(
            f"{runtime} refuses the file, which is not kept: {error}; {_newer(runtime)}"
            "choose another format, or pass check=False to have it anyway"
        ) from error
    largest = max((_most(e.double()) for e in example.outputs.values()), default=0.0)
    furthest = _apart(answers, example)
    far = not furthest <= FAR * largest
    level = logging.WARNING if far else logging.INFO
    told = "%s differs from torch by %.2g at most, where outputs reach %.2g"
    if far and plainly is not None and _apart(plainly(), example) <= FAR * largest:
        told += (
            "; it does not with ORT_ENABLE_BASIC: the file is right, and the int8 "
            "kernels that it fuses on this processor are not exact (as on x86 without "
            "VNNI: docs/exports.md)"
        )
    log.log(level, told, runtime, furthest, largest)
    return furthest


def _apart(answers: Sequence[Any], example: Example) -> float:
    """The largest difference of answers from torch's; NaN if there is one."""
    furthest = 0.0
    for answer, expected in zip(answers, example.outputs.values(), strict=False):
        reference = expected.double().cpu()
        found = torch.as_tensor(answer).double().reshape(reference.shape)
        apart = _most(found - reference)
        furthest = apart if apart != apart else max(furthest, apart)
    return furthest


def _most(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
