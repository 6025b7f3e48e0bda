"""Exports through Brevitas' own exporters, with the settings that work for adapters.

The names and arguments are Brevitas'. The model itself is not touched, files are
written whole or not at all, and what a format cannot hold is refused by the layer's
name.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from brevitas.nn.utils import merge_quant_weights
from torch import nn

from cora_plugin.adapters.errors import CoRaError, ModelError
from cora_plugin.adapters.files import whole_file
from cora_plugin.integrations.brevitas import private
from cora_plugin.integrations.brevitas.insert import in_int8
from cora_plugin.integrations.brevitas.integer_biases import watched_biases
from cora_plugin.integrations.brevitas.layers import find_scales, unpack
from cora_plugin.integrations.checked import check_onnx, check_torchscript, wanted
from cora_plugin.integrations.example import Example, flattened, in_float32
from cora_plugin.integrations.onnx import TRACED_OPSET
from cora_plugin.integrations.parallel import bare
from cora_plugin.integrations.scopes import evaluation
from cora_plugin.outputs import Batch

# The dynamo exporter rejects quantized biases.
_TORCHSCRIPT = {"dynamo": False, "keep_initializers_as_inputs": False}


def export_onnx_qcdq(
    model: nn.Module,
    args: Batch,
    export_path: str | os.PathLike[str],
    opset_version: int | None = None,
    packed: bool = False,
    int8_kernels: bool = False,
    check: bool | None = None,
    dynamic_batch: bool = False,
    **kwargs: Any,
) -> float | None:
    """Write a model, adapters included, as ONNX with QuantizeLinear/DequantizeLinear.

    Weights are stored as integers: int8 with a Clip below 8 bits, unless `packed`.

    Args:
        model: The quantized model.
        args: Example input: [N, …], a tuple of arguments or a mapping of keywords.
        export_path: The ONNX file.
        opset_version: ONNX operator set, 17 by default; packed weights need their own.
        packed: Store weights of 4 bits and fewer as INT4 or UINT4 (opset 21), the
            narrowest that ONNX has there; adapters stay int8.
        int8_kernels: Write the graph so that onnxruntime and OpenVINO run it in int8
            kernels: they add each adapter to its layer's weight when they load the
            file, and round the sum to 8 bits a channel, whose mean error biases take
            back. The file is `packed` as well.
        check: Load the file, run the example and compare it with torch; None: where
            onnxruntime is installed.
        dynamic_batch: Leave the first axis of every input and output free, unless
            `dynamic_axes` says what is.
        kwargs: Passed on to Brevitas and from there to `torch.onnx.export`, such as
            `input_names`, `output_names` and `dynamic_axes`.

    Returns:
        The largest difference from torch, None where it was not checked.

    Raises:
        ModelError: The format cannot hold the model, or onnxruntime refuses the file.
        DataError: The model cannot be run on the example input.
        CoRaError: Options contradict each other, or a package that Brevitas needs is
            not installed.
        OSError: The file cannot be written; no partial file is left.
    """
    rewritten = packed or int8_kernels
    _check_onnx(*(["onnx_ir"] if rewritten else []))
    from brevitas.export import export_onnx_qcdq as export

    given = {"opset_version": opset_version, "dynamo": kwargs.get("dynamo")}
    for option, value in given.items():
        if rewritten and value:
            raise CoRaError(
                f"{option}={value}: packed weights and int8 kernels are written for "
                f"opset 21 from a traced graph; leave {option} out"
            )
    ready, example = _ready(model, args, integer_biases=True)
    rounding = in_int8(ready, int8_kernels)
    manager = private.onnx_qcdq_manager()
    difference = None
    with whole_file(export_path) as path:
        with _explained(manager, model):
            opset = opset_version or (TRACED_OPSET if rewritten else 17)
            options = _TORCHSCRIPT | {"opset_version": opset} | kwargs
            names = _names(options, example, dynamic_batch)
            traced = _traceable(ready, example)
            export(traced, args=_arguments(example), export_path=path, **options)
            _write_out_padding(path)
            if rewritten:
                _rewrite(path, rounding if int8_kernels else None)
        if wanted(check, "onnxruntime"):
            difference = check_onnx(path, example, names)
    return difference


def export_qonnx(
    model: nn.Module,
    args: Batch,
    export_path: str | os.PathLike[str],
    opset_version: int = 17,
    dynamic_batch: bool = False,
    **kwargs: Any,
) -> None:
    """Write a model, adapters included, as QONNX.

    QONNX stores float weights, and its `Quant` nodes round them to the nearest integer
    when the file is run. Where a layer rounds in another way, as after learned round,
    weights that are rounded already are stored.

    Args and errors are those of `export_onnx_qcdq`.
    """
    _check_onnx()
    from brevitas.export import export_qonnx as export

    ready, example = _ready(model, args, integer_biases=False)
    in_int8(ready, False)
    manager = private.qonnx_manager()
    with whole_file(export_path) as path, _explained(manager, model):
        options = _TORCHSCRIPT | {"opset_version": opset_version} | kwargs
        _names(options, example, dynamic_batch)
        if private.rounds_in_its_own_way(ready):
            merge_quant_weights(ready, *example.args)
        traced = _traceable(ready, example)
        export(traced, args=_arguments(example), export_path=path, **options)
        _write_out_padding(path)


def export_torch_qcdq(
    model: nn.Module,
    args: Batch,
    export_path: str | os.PathLike[str],
    check: bool | None = None,
    **kwargs: Any,
) -> float | None:
    """Write a model, adapters included, as TorchScript with integer weights.

    `torch.jit.load` runs the file, without Brevitas.

    Args and errors are those of `export_onnx_qcdq`; `kwargs` go to Brevitas, and the
    file is checked with torch unless `check` is false.
    """
    from brevitas.export import export_torch_qcdq as export

    ready, example = _ready(model, args, integer_biases=True)
    in_int8(ready, False)
    manager = private.torch_qcdq_manager()
    with whole_file(export_path) as path:
        with _explained(manager, model):
            traced = export(_traceable(ready, example), _arguments(example), **kwargs)
            # Not torch.jit.save, which takes the process down where the disk is full.
            Path(path).write_bytes(traced.save_to_buffer())
        if check is False:
            return None
        return check_torchscript(lambda: torch.jit.load(path), example, unpack)


def _arguments(example: Example) -> Any:
    """Example inputs as Brevitas takes them."""
    return example.args[0] if len(example.args) == 1 else example.args


def _traceable(ready: nn.Module, example: Example) -> nn.Module:
    """The same, whose answers are now tensors or tuples of them."""
    ready.forward = flattened(ready.forward, example.names, unpack)
    return ready


def _names(options: dict[str, Any], example: Example, dynamic_batch: bool) -> list[str]:
    """Put names and free axes into an exporter's options; the names of the inputs.

    Several inputs and outputs have their own, where none are given.

    Raises:
        CoRaError: They are too many or too few.
    """
    keys = ("input_names", "output_names")
    given = [options.pop(key, None) for key in keys]
    several = len(example.inputs) > 1 or len(example.outputs) > 1
    free = dynamic_batch and options.get("dynamic_axes") is None
    if not (several or free or any(given)):
        return []
    inputs, outputs = example.named(*given)
    options |= dict(zip(keys, (inputs, outputs), strict=True))
    if free:
        options["dynamic_axes"] = example.dynamic_axes(inputs, outputs)
    return inputs


def _rewrite(path: str, rounding: Mapping[str, str] | None) -> None:
    """Pack weights, or write int8 kernels with these rounding shifts."""
    from cora_plugin.integrations.onnx.constants import constants_by_arithmetic
    from cora_plugin.integrations.onnx.export import rewrite
    from cora_plugin.integrations.onnx.int8 import for_int8_kernels
    from cora_plugin.integrations.onnx.packed import pack_weights
    from cora_plugin.integrations.onnx.unsigned import unsigned_beside_moving

    if rounding is not None:
        rewrite(path, partial(for_int8_kernels, rounding=rounding))
    else:
        rewrite(path, pack_weights, unsigned_beside_moving, constants_by_arithmetic)


def _write_out_padding(path: str) -> None:
    from cora_plugin.integrations.onnx.same import write_out_padding

    write_out_padding(path)


def _check_onnx(*more: str) -> None:
    needed = ("onnx", "onnxoptimizer", *more)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise CoRaError(
            f"Brevitas' ONNX exporters need {' and '.join(missing)}; install with: "
            f"pip install {' '.join(missing)}"
        )


@torch.no_grad()
def _ready(
    model: nn.Module, args: Batch, integer_biases: bool
) -> tuple[nn.Module, Example]:
    """A copy on the CPU that has been seen to run with these arguments.

    Formats with integer biases are traced in float32.

    Raises:
        DataError: It does not.
        ModelError: A bias cannot be stored as integers.
    """
    inner = bare(model)
    with evaluation(inner):
        find_scales(inner)
    copied = copy.deepcopy(inner).cpu().eval()
    if integer_biases:
        copied = in_float32(copied)
    with watched_biases(copied, _refuse) if integer_biases else nullcontext():
        example = Example.of(copied, args, unpack)
    return copied, example


def _refuse(problem: str) -> None:
    raise ModelError(problem)


@contextmanager
def _explained(manager: Any, model: nn.Module) -> Iterator[None]:
    """Say of an exporter's failure which layer it cannot write."""
    try:
        with torch.no_grad():
            yield
    except (CoRaError, OSError):
        raise
    except Exception as error:
        culprit = _culprit(manager, bare(model), str(error))
        way_out = "quantize to 2 to 8 bits, with one scale a channel or a tensor"
        raise ModelError(
            f"Brevitas cannot write the model in this format: {error}"
            if culprit is None
            else f"{culprit}; {way_out}, or choose another format"
        ) from error


def _culprit(manager: Any, model: nn.Module, said: str) -> str | None:
    """The quantizer that an exporter has no way to write: which said so, or the first.

    Biases are asked without the scales that a run gives them: what they alone say may
    be that these are missing.
    """
    # Being asked changes it, and the model is the user's.
    asked = private.quantizers(copy.deepcopy(model).cpu().eval())
    reasons = {name: private.unwritable(manager, proxy) for name, proxy in asked}
    culprits = [name for name, reason in reasons.items() if reason == said]
    culprits += [
        name
        for name, reason in reasons.items()
        if reason is not None and not name.endswith("bias_quant")
    ]
    if not culprits:
        return None
    layer, _, role = culprits[0].rpartition(".")
    reason = reasons[culprits[0]]
    return f"{layer}: Brevitas cannot write its {role} in this format: {reason}"
