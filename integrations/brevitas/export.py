"""Exports through Brevitas' own exporters, with the settings that work for adapters."""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters.files import whole_file


def export_onnx_qcdq(
    model: nn.Module,
    args: Tensor,
    export_path: str | os.PathLike[str],
    opset_version: int = 17,
    **kwargs: Any,
) -> None:
    """Write a model, adapters included, as ONNX with QuantizeLinear/DequantizeLinear.

    Weights are stored as integers: int8 with a Clip below 8 bits. The model itself is
    not touched, and the file is written whole or not at all.

    Args:
        model: The quantized model.
        args: Example input, [N, …].
        export_path: The ONNX file.
        opset_version: ONNX operator set.
        kwargs: Passed on to Brevitas and from there to `torch.onnx.export`.
    """
    from brevitas.export import export_onnx_qcdq as export

    # The dynamo exporter rejects quantized biases.
    options = {"dynamo": False, "keep_initializers_as_inputs": False} | kwargs
    with whole_file(export_path) as temporary, torch.no_grad():
        export(
            copy.deepcopy(model).eval(),
            args=args,
            export_path=temporary,
            opset_version=opset_version,
            **options,
        )
