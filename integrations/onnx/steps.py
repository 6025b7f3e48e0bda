"""Moves per-channel steps of activation quantizers into the layers around them.

NNCF quantizes what depthwise convolutions read by a step a channel; kernels take one.
With `S` the largest step and `s` a channel's, the layer before makes the channel `S/s`
times larger, the quantizer has step `S`, and the layer behind has weights `s/S` times
as large. The integers between are the same as before.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.affine import scale_channels
from cora_plugin.integrations.onnx.fold import Layer, layer_of
from cora_plugin.integrations.onnx.graph import (
    Graph,
    array_of,
    operand,
    producer,
    read_once,
)

LEVELS = {np.dtype(np.uint8): (0, 255), np.dtype(np.int8): (-128, 127)}


def merge_steps(graph: Graph) -> None:
    """Give activations a single step where the layers around can absorb the others."""
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear":
            _merge(graph, node)


def _merge(graph: Graph, rounding: ir.Node) -> None:
    step, zero = array_of(rounding.inputs[1]), array_of(operand(rounding, 2))
    if step is None or zero is None or step.size == 1 or zero.dtype not in LEVELS:
        return
    if rounding.attributes.get_int("axis", 1) != 1:
        return
    before = _layer_before(rounding.inputs[0])
    behind = list(_layers_behind(rounding, len(step)))
    if before is None or None in behind or before[0].shape[0] != len(step):
        return
    layer, low, high = before
    lowest, highest = LEVELS[zero.dtype]
    step = step.astype(np.float64)
    if (zero != zero[0]).any():
        if low < 0:
            return
        # The levels of negative values are never used: all of them for the others.
        step *= (highest - zero.astype(np.float64)) / (highest - lowest)
        zero = np.full_like(zero, lowest)
    # The quantizer must clip all that is clipped now: what stands between goes.
    levels = np.round(np.array([low, high])[:, None] / step) + zero[0]
    if (levels[0] > lowest).any() or (levels[1] < highest).any():
        return
    single = step.max().astype(np.float32)
    factor = single / step
    scale_channels(graph, layer, factor)
    rounding.replace_input_with(0, layer.output)
    levels = rounding.outputs[0]
    scale = graph.constant(f"{levels.name}_step", single)
    offset = graph.constant(f"{levels.name}_zero", zero[0], zero.dtype)
    for node in (rounding, *levels.consumers()):
        node.replace_input_with(1, scale)
        node.replace_input_with(2, offset)
        node.attributes.clear()
    for other in behind:
        if other is not None:
            repeated = np.repeat(1 / factor, other.shape[0] // len(factor))
            scale_channels(graph, other, repeated, bias=False)


def _layer_before(value: ir.Value | None) -> tuple[Layer, float, float] | None:
    """The convolution behind a value, and between which bounds the value is clipped."""
    low, high = -np.inf, np.inf
    while read_once(value):
        node = producer(value)
        layer = layer_of(node)
        if layer is not None:
            return (layer, low, high) if layer.node.op_type == "Conv" else None
        if node is None or node.op_type not in ("Clip", "Relu"):
            return None
        if node.op_type == "Relu":
            low = max(low, 0.0)
        else:
            given = operand(node, 1), operand(node, 2)
            bounds = [np.nan if each is None else array_of(each) for each in given]
            if bounds[0] is None or bounds[1] is None:
                return None
            # fmax and fmin pass over what is not given.
            low = float(np.fmax(low, bounds[0]))
            high = float(np.fmin(high, bounds[1]))
        value = node.inputs[0]
    return None


def _layers_behind(rounding: ir.Node, channels: int) -> Iterator[Layer | None]:
    """The depthwise layers that read the quantized value; None for any other reader."""
    if rounding.outputs[0].is_graph_output():
        yield None
    for node in rounding.outputs[0].consumers():
        restored = node.outputs[0]
        if node.op_type != "DequantizeLinear" or restored.is_graph_output():
            yield None
        for reader in restored.consumers():
            layer = layer_of(reader)
            depthwise = layer is not None and layer.operation.get("group") == channels
            yield layer if depthwise else None
