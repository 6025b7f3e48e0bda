"""Merges the offset or batch norm that follows a layer into the layer."""

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.fold import Layer, layer_of
from cora_plugin.integrations.onnx.graph import (
    Array,
    Graph,
    array_of,
    producer,
    read_once,
)
from cora_plugin.integrations.onnx.rounding import scale_rounding_shift


def absorb_affine(graph: Graph) -> None:
    """Merge the offsets and batch norms that follow layers into them."""
    for node in graph.nodes:
        found = _affine(node)
        if found is not None:
            layer, factor, offset = found
            if factor is not None:
                _scale_weight(graph, layer, factor)
                scale_rounding_shift(layer.node, factor)
            set_bias(graph, layer, offset)
            graph.replace(node, layer.output)


def _affine(node: ir.Node) -> tuple[Layer, Array | None, Array] | None:
    """The layer before a node, the factors [m] of its weight, and its new bias [m]."""
    if node.op_type == "BatchNormalization":
        if node.attributes.get_int("training_mode", 0):
            return None
        source, *parameters = node.inputs
        values = [array_of(value) for value in parameters]
    elif node.op_type == "Add":
        constant = [array_of(value) is not None for value in node.inputs]
        if sum(constant) != 1:
            return None
        source, offset = node.inputs if constant[1] else node.inputs[::-1]
        values = [array_of(offset)]
    else:
        return None
    layer = layer_of(producer(source))
    if layer is None or layer.node.op_type == "MatMul" or not read_once(source):
        return None
    if any(value is None for value in values):
        return None
    present = array_of(layer.bias)
    if layer.bias is not None and present is None:
        return None
    channels = layer.shape[layer.axis]
    bias = np.zeros(channels) if present is None else np.float64(present).reshape(-1)
    if node.op_type == "Add":
        return _with_offset(layer, np.asarray(values[0], np.float64), bias)
    scale, shift, mean, variance = (np.asarray(v, np.float64) for v in values)
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return layer, factor, (bias - mean) * factor + shift


def _with_offset(
    layer: Layer, offset: Array, bias: Array
) -> tuple[Layer, None, Array] | None:
    """None unless the offset is one number a channel."""
    behind = len(layer.shape) - 2 if layer.node.op_type == "Conv" else 0
    wanted = (len(bias), *[1] * behind)
    shape = offset.shape
    while len(shape) > len(wanted) and shape[0] == 1:
        shape = shape[1:]
    return (layer, None, bias + offset.reshape(-1)) if shape == wanted else None


def scale_channels(
    graph: Graph, layer: Layer, factor: Array, bias: bool = True
) -> None:
    """Multiply a layer's output channels by factors [m], its bias only if asked to."""
    _scale_weight(graph, layer, factor)
    if not bias:
        return
    scale_rounding_shift(layer.node, factor)
    present = array_of(layer.bias)
    if present is not None:
        set_bias(graph, layer, np.float64(present).reshape(-1) * factor)


def _scale_weight(graph: Graph, layer: Layer, factor: Array) -> None:
    """Stored integers stay as they are where their scales can change."""
    node = layer.weight.producer()
    name = f"{layer.weight.name}_scaled"
    shape = [1] * len(layer.shape)
    shape[layer.axis] = -1
    if node is not None and node.op_type == "DequantizeLinear":
        scale = array_of(node.inputs[1])
        axis = node.attributes.get_int("axis", 1) % len(layer.shape)
        if scale is not None and scale.ndim == 1 and axis == layer.axis:
            inputs = list(node.inputs)
            inputs[1] = graph.constant(f"{name}_scale", scale * factor)
            scaled = graph.node("DequantizeLinear", inputs, name, axis=axis)
            layer.node.replace_input_with(1, scaled)
            return
    factors = graph.constant(f"{name}_factor", factor.reshape(shape))
    scaled = graph.node("Mul", [layer.weight, factors], name)
    layer.node.replace_input_with(1, scaled)


def set_bias(graph: Graph, layer: Layer, bias: Array) -> None:
    """Give a layer this bias [m], in place of the one it may have."""
    layer.node.resize_inputs(3)
    offset = graph.constant(f"{layer.output.name}_offset", bias)
    layer.node.replace_input_with(2, offset)
