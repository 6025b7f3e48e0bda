"""Rewrites a QDQ model so that runtimes run all they can in int8 kernels.

A kernel is fused from DequantizeLinear, layer and QuantizeLinear, where weights are
8-bit integers and a bias is int32 in steps of input scale times weight scale. Weights
are brought to that form by operators on constants, which runtimes carry out once, when
they load the file; the file itself keeps the packed weights and the adapters' factors.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.affine import absorb_affine, set_bias
from cora_plugin.integrations.onnx.constants import constants_by_arithmetic
from cora_plugin.integrations.onnx.fold import Layer, fold_branches, layer_of
from cora_plugin.integrations.onnx.graph import (
    INT4,
    Array,
    Graph,
    array_of,
    known,
    operand,
    producer,
)
from cora_plugin.integrations.onnx.moving import (
    round_after_moving,
    round_before_moving,
)
from cora_plugin.integrations.onnx.packed import pack_weights
from cora_plugin.integrations.onnx.padding import absorb_padding
from cora_plugin.integrations.onnx.rounding import (
    drop_rounding_shifts,
    rounding_shift,
    take_rounding_shifts,
    warn_of_coarse_steps,
)
from cora_plugin.integrations.onnx.steps import merge_steps
from cora_plugin.integrations.onnx.sums import round_sums
from cora_plugin.integrations.onnx.unsigned import unsigned_beside_moving

TOP = 127
"""Largest magnitude of an 8-bit weight."""

BIAS_TOP = 2**30
"""Largest magnitude of an int32 bias, which leaves room for the sum of products."""


def for_int8_kernels(graph: Graph, rounding: Mapping[str, str] | None = None) -> None:
    """Bring a graph of QuantizeLinear and DequantizeLinear to the form of int8 kernels.

    Adapters are folded into their layers' weights, which are rounded to 8 bits a
    channel; 4-bit weights without an adapter stay exact. Activations are rounded by the
    same quantizers as before, and so is what residual sums read.

    Args:
        graph: The graph.
        rounding: Initializers that the model adds behind layers to undo the mean error
            of that rounding, with the layers' names; kept for what is rounded alone.
    """
    for step in (
        pack_weights,
        absorb_padding,
        fold_branches,
        partial(take_rounding_shifts, names=rounding or {}),
        absorb_affine,
        merge_steps,
        round_sums,
        round_before_moving,
        round_after_moving,
        _integer_weights,
        unsigned_beside_moving,
        constants_by_arithmetic,
    ):
        step(graph)
        graph.prune()


def _integer_weights(graph: Graph) -> None:
    for node in graph.nodes:
        layer = layer_of(node)
        if layer is not None:
            _weight_and_bias(graph, layer)


def _weight_and_bias(graph: Graph, layer: Layer) -> None:
    """Give a layer with quantized input an 8-bit weight and an int32 bias."""
    step = _step(layer.source)
    if step is None:
        drop_rounding_shifts(graph, layer)
        return
    weight = _channels(known(layer.weight), layer.axis)  # [m, k]
    bias = array_of(layer.bias)
    stored = _stored_scale(layer)
    shift = rounding_shift(layer.node)
    if shift is not None:
        present = 0.0 if bias is None else bias.astype(np.float64).reshape(-1)
        bias = present + shift.values
        set_bias(graph, layer, bias)
    smallest = np.full(len(weight), np.finfo(np.float32).tiny)
    # Where channels have steps of their own, no int32 bias is in steps of the products.
    if step.size > 1:
        bias = None
    if bias is not None:
        # A channel with tiny weights beside a large bias would overflow the int32.
        smallest = np.maximum(smallest, np.abs(bias.reshape(-1)) / (BIAS_TOP * step))
    scale = np.abs(weight).max(1) / TOP if stored is None else np.abs(stored)
    scale = np.maximum(scale, smallest).astype(np.float32)
    if stored is None or (scale != stored).any():
        _round_weight(graph, layer, scale)
    else:
        _widen_weight(graph, layer)
    if bias is not None:
        lost = _int32_bias(graph, layer, bias.reshape(-1), np.float32(step) * scale)
        warn_of_coarse_steps(layer, lost)


def _round_weight(graph: Graph, layer: Layer, scale: Array) -> None:
    name = f"{layer.output.name}_int8"
    parameters = [
        graph.constant(f"{name}_scale", scale),
        graph.constant(f"{name}_zero", np.zeros(len(scale)), np.int8),
    ]
    axis = layer.axis
    levels = graph.node("QuantizeLinear", [layer.weight, *parameters], name, axis=axis)
    weight = graph.node(
        "DequantizeLinear", [levels, *parameters], f"{name}_weight", axis=axis
    )
    layer.node.replace_input_with(1, weight)


def _widen_weight(graph: Graph, layer: Layer) -> None:
    """Let a Cast make 8-bit integers of 4-bit ones, for kernels take no others."""
    node = layer.weight.producer()
    if node is None or known(node.inputs[0]).dtype != INT4:
        return
    levels, scale = node.inputs[:2]
    name = f"{layer.output.name}_int8"
    wide = graph.node("Cast", [levels], name, to=ir.DataType.INT8)
    zero = graph.constant(f"{name}_zero", np.zeros(known(scale).shape), np.int8)
    weight = graph.node(
        "DequantizeLinear", [wide, scale, zero], f"{name}_weight", **node.attributes
    )
    layer.node.replace_input_with(1, weight)


def _int32_bias(graph: Graph, layer: Layer, bias: Array, scale: Array) -> Array:
    """Give a layer its bias in steps of `scale` [m]; returns what rounding takes."""
    name = f"{layer.output.name}_bias"
    levels = np.round(bias.astype(np.float64) / scale)
    inputs = [
        graph.constant(f"{name}_int32", levels, np.int32),
        graph.constant(f"{name}_scale", scale),
        graph.constant(f"{name}_zero", np.zeros(len(scale)), np.int32),
    ]
    restored = graph.node("DequantizeLinear", inputs, f"{name}_float", axis=0)
    layer.node.replace_input_with(2, restored)
    lost: Array = bias - levels * scale
    return lost


def _stored_scale(layer: Layer) -> Array | None:
    """The scales [m] of a weight that is stored as signed integers around zero."""
    node = layer.weight.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    stored, scale = node.inputs[0], array_of(node.inputs[1])
    zero = array_of(operand(node, 2))
    if scale is None or (zero is not None and zero.any()):
        return None
    if stored is None or not stored.is_initializer():
        return None
    if known(stored).dtype not in (INT4, np.int8):
        return None
    axis = node.attributes.get_int("axis", 1) % len(layer.shape)
    if scale.size > 1 and (scale.ndim != 1 or axis != layer.axis):
        return None
    return np.broadcast_to(scale.reshape(-1), layer.shape[layer.axis])


def _step(value: ir.Value | None) -> Array | None:
    """The step of a quantized activation, [] or one a channel."""
    node = producer(value)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return array_of(node.inputs[1])


def _channels(weight: Array, axis: int) -> Array:
    moved = np.moveaxis(np.asarray(weight, np.float64), axis, 0)
    return moved.reshape(len(moved), -1)
