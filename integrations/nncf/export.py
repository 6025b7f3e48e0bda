"""Exports: OpenVINO IR, ONNX with QuantizeLinear/DequantizeLinear, torch.export.

None of them touches the model.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from cora_plugin.adapters.errors import FileError
from cora_plugin.adapters.files import whole_file
from cora_plugin.integrations.checked import check_onnx, check_openvino, wanted
from cora_plugin.integrations.example import (
    Example,
    flattened,
    in_float32,
)
from cora_plugin.integrations.nncf import private
from cora_plugin.integrations.nncf.insert import in_int8
from cora_plugin.integrations.nncf.layers import check_model
from cora_plugin.integrations.nncf.private import get_hook_storage
from cora_plugin.integrations.onnx import TRACED_OPSET
from cora_plugin.integrations.parallel import bare
from cora_plugin.integrations.required import require
from cora_plugin.outputs import Batch, device_of, moved


def export_openvino(
    model: nn.Module,
    example_input: Batch,
    path: str | os.PathLike[str],
    compress_to_fp16: bool = True,
    int8_kernels: bool = False,
    check: bool | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool | None = None,
) -> float | None:
    """Write a model, adapters included, as OpenVINO IR: `path` and its `.bin`.

    Weights of 4 bits and fewer are stored as packed i4, 8-bit weights and adapters as
    i8.

    Args:
        model: The quantized model.
        example_input: Input that the model is traced with: [N, …], a tuple of arguments
            or a mapping of keywords.
        path: The `.xml` file.
        compress_to_fp16: Store what is not quantized as float16, as far as OpenVINO
            does: where activations are quantized, 2026.4 leaves all of it in float32.
        int8_kernels: Fold adapters into weights of 8 bits, which OpenVINO runs in int8
            kernels, as `export_onnx` does; all weights are stored as i8.
        check: Load the file, run the example and compare it with torch; None: yes.
        input_names: Names of the inputs in their order; None: the arguments' own.
        output_names: Names of the outputs; None: `output`, or their own.
        dynamic_batch: Leave the first axis free and no other, or none where it is
            false; None: as OpenVINO traces it, which leaves all that it can.

    Returns:
        The largest difference from torch, None where it was not checked.

    Raises:
        FileError: The path does not end in .xml.
        ModelError: The model is not one of NNCF's, or OpenVINO refuses the file.
        DataError: The model does not run with the example.
        CoRaError: openvino, onnx or onnx-ir is missing.
        OSError: A file cannot be written; what was there before is left.
    """
    target = Path(path)
    if target.suffix != ".xml":
        raise FileError(f"{path}: OpenVINO IR is a .xml and a .bin; name the .xml file")
    model = bare(model)
    check_model(model)
    require("OpenVINO IR", "openvino")
    import openvino

    from cora_plugin.integrations.nncf.ir import divide_factors

    example = Example.of(in_float32(_copy(model).cpu()), example_input)
    difference = None
    with (
        whole_file(target) as xml,
        whole_file(target.with_suffix(".bin")) as binary,
        _quiet_tracing(),
    ):
        if int8_kernels:
            with TemporaryDirectory() as folder:
                traced = Path(folder) / "model.onnx"
                export_onnx(
                    model,
                    example_input,
                    traced,
                    int8_kernels=True,
                    dynamic_batch=dynamic_batch,
                    check=False,
                )
                converted = openvino.convert_model(traced)
        else:
            copied = _with_own_levels(_traceable(model))
            in_int8(copied, False)
            copied.forward = flattened(copied.forward, example.names)
            args = example.args[0] if len(example.args) == 1 else example.args
            converted = openvino.convert_model(copied, example_input=args)
            divide_factors(converted)
        _describe(converted, example, input_names, output_names, dynamic_batch)
        written = Path(xml).with_suffix(".bin")
        try:
            openvino.save_model(converted, xml, compress_to_fp16=compress_to_fp16)
            if check is not False:
                difference = check_openvino(xml, example)
            os.replace(written, binary)
        except RuntimeError as error:  # a full disk is a "basic_ios::clear" there
            raise OSError(
                f"cannot write {target}: OpenVINO failed to save it ({error}); see "
                "that the disk has room"
            ) from error
        finally:
            written.unlink(missing_ok=True)
    return difference


def export_onnx(
    model: nn.Module,
    example_input: Batch,
    path: str | os.PathLike[str],
    int8_kernels: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    check: bool | None = None,
    dynamic_batch: bool | None = None,
) -> float | None:
    """Write a model, adapters included, as ONNX of standard operators (opset 21).

    Weights are integers behind a DequantizeLinear: int4 at 4 bits and fewer, else int8;
    adapters likewise.

    Args:
        model: The quantized model.
        example_input: Input that the model is traced with: [N, …], a tuple of arguments
            or a mapping of keywords.
        path: The ONNX file.
        int8_kernels: Write the graph so that onnxruntime and OpenVINO run it in int8
            kernels: they add each adapter to its layer's weight when they load the
            file, and round the sum to 8 bits a channel, whose mean error biases take
            back. The file still stores packed weights and factors.
        input_names: Names of the inputs; None: `input`, or those of the arguments.
        output_names: Names of the outputs; None: `output`, or their own.
        dynamic_axes: Axes that are left free, as `torch.onnx.export` takes them.
        check: Load the file, run the example and compare it with torch; None: where
            onnxruntime is installed.
        dynamic_batch: Leave the first axis of every input and output free, unless
            `dynamic_axes` says what is; None: yes.

    Returns:
        The largest difference from torch, None where it was not checked.

    Raises:
        ModelError: The model is not one of NNCF's, or onnxruntime refuses the file.
        DataError: The model does not run with the example.
        CoRaError: onnx or onnx-ir is missing.
        OSError: The file cannot be written; what was there before is left.
    """
    model = bare(model)
    check_model(model)
    require("ONNX export", "onnx", "onnx_ir")
    from cora_plugin.integrations.nncf.qdq import fake_quantize_to_qdq
    from cora_plugin.integrations.onnx.constants import constants_by_arithmetic
    from cora_plugin.integrations.onnx.export import rewrite
    from cora_plugin.integrations.onnx.int8 import for_int8_kernels
    from cora_plugin.integrations.onnx.same import write_out_padding
    from cora_plugin.integrations.onnx.unsigned import unsigned_beside_moving

    copied = _traceable(model)
    example = Example.of(copied, example_input)
    rounding = in_int8(copied, int8_kernels)
    copied.forward = flattened(copied.forward, example.names)
    inputs, outputs = example.named(input_names, output_names)
    if dynamic_axes is None and dynamic_batch is not False:
        dynamic_axes = example.dynamic_axes(inputs, outputs)
    difference = None
    with whole_file(path) as temporary, _quiet_tracing():
        torch.onnx.export(
            copied,
            example.args,
            temporary,
            dynamo=False,
            opset_version=TRACED_OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=dynamic_axes,
        )
        write_out_padding(temporary)
        steps = [unsigned_beside_moving, constants_by_arithmetic]
        if int8_kernels:
            steps = [partial(for_int8_kernels, rounding=rounding)]
        rewrite(temporary, fake_quantize_to_qdq, *steps)
        if wanted(check, "onnxruntime"):
            difference = check_onnx(temporary, example, inputs)
    return difference


def _describe(
    converted: Any,
    example: Example,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    dynamic_batch: bool | None,
) -> None:
    """Name a converted model's inputs and outputs, and say which axes are free."""
    names = example.named(input_names, output_names)
    if dynamic_batch is not None:
        free = example.dynamic_axes(names[0], ()) if dynamic_batch else {}
        shapes = {}
        for port, name, value in zip(
            converted.inputs, names[0], example.inputs, strict=True
        ):
            sizes = list(value.shape)
            shapes[port] = [-1, *sizes[1:]] if name in free else sizes
        converted.reshape(shapes)
    for given, own, ports in (
        (input_names, names[0], converted.inputs),
        (output_names, names[1], converted.outputs),
    ):
        if given is not None:
            for port, name in zip(ports, own, strict=True):
                port.get_tensor().set_names({name})


def exportable(model: nn.Module) -> nn.Module:
    """A copy whose quantizers are plain torch, which `torch.export` can follow."""
    model = bare(model)
    check_model(model)
    copied = _copy(model)
    in_int8(copied, False)
    storage = get_hook_storage(copied)
    for name, module in list(storage.named_modules(remove_duplicate=False)):
        if isinstance(module, BaseQuantizer):
            storage.set_submodule(name, StaticQuantizer(module))
    return copied


def export_program(
    model: nn.Module, example_input: Batch
) -> torch.export.ExportedProgram:
    """Run `torch.export` on a model, adapters included.

    Args:
        model: The quantized model.
        example_input: As for `export_onnx`.
    """
    with torch.no_grad():
        example = moved(example_input, device_of(model))
        args: tuple[Any, ...] = (example,)
        keywords = None
        if isinstance(example, Mapping):
            args, keywords = (), dict(example)
        elif isinstance(example, tuple):
            args = example
        return torch.export.export(exportable(model), args, keywords)


class StaticQuantizer(nn.Module):
    """What an NNCF quantizer does, in operators that any exporter knows.

    Step by step as NNCF computes it, for another order tips values halfway between two
    levels to the other one.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: Any) -> None:
        super().__init__()
        self.enabled = quantizer.is_enabled_quantization()
        with torch.no_grad():
            low, high = (t.clone() for t in quantizer.get_input_low_input_high())
            scale = (quantizer.levels - 1) / (high - low)  # levels a unit
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.round(-low * scale))

    def forward(self, x: Tensor) -> Tensor:
        """The input on the quantizer's grid."""
        if not self.enabled:
            return x
        clipped = torch.maximum(torch.minimum(x, self.high), self.low)
        levels = torch.round((clipped - self.low) * self.scale - self.zero_point)
        # NNCF keeps the model's type, in which scales may not be.
        return (levels / self.scale).to(x.dtype)


def _traceable(model: nn.Module) -> nn.Module:
    """A copy in float32 on the CPU, whose quantizers NNCF can trace."""
    copied = in_float32(_copy(model).cpu())
    for quantizer in get_hook_storage(copied).modules():
        if isinstance(quantizer, BaseQuantizer):
            private.trace_one_scale(quantizer)
    return copied


def _with_own_levels(model: nn.Module) -> nn.Module:
    """Have quantizers of a narrow range traced with the levels that they have."""
    for quantizer in get_hook_storage(model).modules():
        if isinstance(quantizer, BaseQuantizer):
            private.trace_whole_range(quantizer)
    return model


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Silence the tracers' warnings about Python branches: ours are static.

    OpenVINO's tracer raises the root logger's level and leaves it so; it is put back.
    """
    loggers = logging.getLogger(), logging.getLogger("torch.onnx")
    levels = [logger.level for logger in loggers]
    loggers[1].setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
