"""Merges what follows a layer a channel, an offset or a batch norm, into the layer."""

import numpy as np
import onnx

from cora_plugin.integrations.onnx.fold import Layer, layer_of
from cora_plugin.integrations.onnx.graph import Array, Graph, attributes


def absorb_affine(graph: Graph) -> None:
    """Let layers add the offsets and do the batch norms that follow them."""
    for node in list(graph.nodes):
        found = _affine(graph, node)
        if found is not None:
            layer, factor, offset = found
            if factor is not None:
                _scale_weight(graph, layer, factor)
            _set_bias(graph, layer, offset)
            graph.supersede(node, layer.node)


def _affine(
    graph: Graph, node: onnx.NodeProto
) -> tuple[Layer, Array | None, Array] | None:
    """The layer before a node, the factors [m] of its weight, and its new bias [m]."""
    if node.op_type == "BatchNormalization":
        if attributes(node).get("training_mode", 0):
            return None
        source, *parameters = node.input
        values = [graph.value(name) for name in parameters]
    elif node.op_type == "Add":
        constant = [graph.is_constant(name) for name in node.input]
        if sum(constant) != 1:
            return None
        source, offset = node.input if constant[1] else list(node.input)[::-1]
        values = [graph.value(offset)]
    else:
        return None
    layer = layer_of(graph, graph.producer(source))
    if layer is None or layer.node.op_type == "MatMul" or not graph.read_once(source):
        return None
    if any(value is None for value in values):
        return None
    present = None if layer.bias is None else graph.value(layer.bias)
    if layer.bias is not None and present is None:
        return None
    channels = layer.shape[layer.axis]
    bias = np.zeros(channels) if present is None else np.float64(present).reshape(-1)
    if node.op_type == "Add":
        return _with_offset(layer, np.asarray(values[0], np.float64), bias)
    scale, shift, mean, variance = (np.asarray(v, np.float64) for v in values)
    factor = scale / np.sqrt(variance + attributes(node).get("epsilon", 1e-5))
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
    present = None if layer.bias is None else graph.value(layer.bias)
    if bias and present is not None:
        _set_bias(graph, layer, np.float64(present).reshape(-1) * factor)


def _scale_weight(graph: Graph, layer: Layer, factor: Array) -> None:
    """Stored integers stay as they are where their scales can change."""
    node = graph.producer(layer.weight)
    name = f"{layer.weight}_scaled"
    shape = [1] * len(layer.shape)
    shape[layer.axis] = -1
    if node is not None and node.op_type == "DequantizeLinear":
        scale = graph.value(node.input[1])
        axis = attributes(node).get("axis", 1) % len(layer.shape)
        if scale is not None and scale.ndim == 1 and axis == layer.axis:
            inputs = list(node.input)
            inputs[1] = graph.constant(f"{name}_scale", scale * factor)
            layer.node.input[1] = graph.node(
                "DequantizeLinear", inputs, name, axis=layer.axis
            )
            return
    factors = graph.constant(f"{name}_factor", factor.reshape(shape))
    layer.node.input[1] = graph.node("Mul", [layer.weight, factors], name)


def _set_bias(graph: Graph, layer: Layer, bias: Array) -> None:
    name = graph.constant(f"{layer.node.output[0]}_offset", bias)
    inputs = [*list(layer.node.input)[:2], name]
    del layer.node.input[:]
    layer.node.input.extend(inputs)
