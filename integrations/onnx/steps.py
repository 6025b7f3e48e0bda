"""Moves the steps an activation quantizer has a channel into the layers around it.

NNCF quantizes what depthwise convolutions read by a step a channel; kernels take one.
With `S` the largest step and `s` a channel's, the layer before makes the channel `S/s`
times larger, the quantizer has step `S`, and the layer behind has weights `s/S` times
as large. The integers between are the same as before.
"""

from collections.abc import Iterator

import numpy as np
import onnx

from cora_plugin.integrations.onnx.affine import scale_channels
from cora_plugin.integrations.onnx.fold import Layer, layer_of
from cora_plugin.integrations.onnx.graph import Graph, attributes

LEVELS = {np.dtype(np.uint8): (0, 255), np.dtype(np.int8): (-128, 127)}


def merge_steps(graph: Graph) -> None:
    """Give every activation one step, where the layers around can take the rest."""
    for node in list(graph.nodes):
        if node.op_type == "QuantizeLinear":
            _merge(graph, node)


def _merge(graph: Graph, rounding: onnx.NodeProto) -> None:
    step = graph.value(rounding.input[1])
    zero = graph.value(rounding.input[2]) if len(rounding.input) > 2 else None
    if step is None or zero is None or step.size == 1 or zero.dtype not in LEVELS:
        return
    if attributes(rounding).get("axis", 1) != 1:
        return
    before = _layer_before(graph, rounding.input[0])
    behind = list(_layers_behind(graph, rounding, len(step)))
    if before is None or None in behind or before[0].shape[0] != len(step):
        return
    layer, low, high = before
    least, most = LEVELS[zero.dtype]
    step = step.astype(np.float64)
    if (zero != zero[0]).any():
        if low < 0:
            return
        # The levels of negative values are never used: all of them for the others.
        step *= (most - zero.astype(np.float64)) / (most - least)
        zero = np.full_like(zero, least)
    # The quantizer must clip all that is clipped now: what stands between goes.
    levels = np.round(np.array([low, high])[:, None] / step) + zero[0]
    if (levels[0] > least).any() or (levels[1] < most).any():
        return
    single = step.max().astype(np.float32)
    factor = single / step
    scale_channels(graph, layer, factor)
    graph.redirect(rounding.input[0], layer.node.output[0], [rounding])
    scale = graph.constant(f"{rounding.output[0]}_step", single)
    offset = graph.constant(f"{rounding.output[0]}_zero", zero[0], zero.dtype)
    for node in (rounding, *graph.readers(rounding.output[0])):
        node.input[1], node.input[2] = scale, offset
        del node.attribute[:]
    for other in behind:
        if other is not None:
            repeated = np.repeat(1 / factor, other.shape[0] // len(factor))
            scale_channels(graph, other, repeated, bias=False)


def _layer_before(graph: Graph, name: str) -> tuple[Layer, float, float] | None:
    """The convolution behind a value, and between which bounds the value is clipped."""
    low, high = -np.inf, np.inf
    while graph.read_once(name):
        node = graph.producer(name)
        layer = layer_of(graph, node)
        if layer is not None:
            return (layer, low, high) if layer.node.op_type == "Conv" else None
        if node is None or node.op_type not in ("Clip", "Relu"):
            return None
        if node.op_type == "Relu":
            low = max(low, 0.0)
        else:
            names = [*list(node.input)[1:], "", ""]
            bounds = [graph.value(bound) if bound else np.nan for bound in names[:2]]
            if bounds[0] is None or bounds[1] is None:
                return None
            # fmax and fmin pass over what is not given.
            low = float(np.fmax(low, bounds[0]))
            high = float(np.fmin(high, bounds[1]))
        name = node.input[0]
    return None


def _layers_behind(
    graph: Graph, rounding: onnx.NodeProto, channels: int
) -> Iterator[Layer | None]:
    """The depthwise layers that read the quantized value; None for any other reader."""
    if rounding.output[0] in graph.outputs:
        yield None
    for restored in graph.readers(rounding.output[0]):
        if restored.op_type != "DequantizeLinear" or restored.output[0] in (
            graph.outputs
        ):
            yield None
        for reader in graph.readers(restored.output[0]):
            layer = layer_of(graph, reader)
            depthwise = layer is not None and layer.operation.get("group") == channels
            yield layer if depthwise else None
