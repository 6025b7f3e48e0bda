"""Rounds the summands of residual sums where a model rounds only layers' inputs.

In `y = layer(x) + skip`, `skip` and `y` may be rounded for the layers that read them
and be float for the sum, so that no integer kernel can end at the layer. Here the sum
reads `skip` as those layers do, within [a, b]. If y is clipped to [c, d] for its
readers, they see the same if what the layer gives is clipped to [c − b, d − a]: a range
that takes no calibration. What is added is rounding, by the steps of `skip` and `y`.
"""

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.fold import layer_of
from cora_plugin.integrations.onnx.graph import (
    Graph,
    array_of,
    known,
    operand,
    producer,
    read_once,
)
from cora_plugin.integrations.onnx.moving import rounds_alike
from cora_plugin.integrations.onnx.steps import LEVELS

Range = tuple[float, float]

MONOTONE = ("Clip", "Relu")
"""Activations that may stand between a sum and its rounding."""


def round_sums(graph: Graph) -> None:
    """Give the layers before residual sums a quantizer, where a range is known."""
    # From the last one on: a sum that is read rounded by the next has a range, too.
    for node in reversed(graph.nodes):
        if node.op_type != "Add" or node.outputs[0].const_value is not None:
            continue
        total = _range_that_is_read(node.outputs[0])
        if total is None:
            continue
        for index, value in enumerate(node.inputs):
            node.replace_input_with(index, _as_layers_read_it(value))
        for index in range(2):
            _round_layer(graph, node, index, total)


def _as_layers_read_it(value: ir.Value | None) -> ir.Value | None:
    """A value after the one quantizer that it has; the value itself if it has none."""
    readers = () if value is None else value.consumers()
    roundings = [node for node in readers if node.op_type == "QuantizeLinear"]
    if not roundings or _range(roundings[0]) is None:
        return value
    if not all(rounds_alike(roundings[0], other) for other in roundings):
        return value
    for reader in roundings[0].outputs[0].consumers():
        if reader.op_type == "DequantizeLinear":
            return reader.outputs[0]
    return value


def _round_layer(graph: Graph, node: ir.Node, index: int, total: Range) -> None:
    """Round a summand that is a layer's output, where the other one is rounded."""
    layer = layer_of(producer(node.inputs[index]))
    if layer is None or not read_once(layer.output):
        return
    other = producer(node.inputs[1 - index])
    skip = None if other is None else _range(other)
    if other is None or skip is None:
        return
    low, high = total[0] - skip[1], total[1] - skip[0]
    name, dtype = layer.output.name, known(other.inputs[2]).dtype
    lowest, highest = LEVELS[dtype]
    step = (high - low) / (highest - lowest)
    parameters = [
        graph.constant(f"{name}_step", step),
        graph.constant(f"{name}_zero", np.round(lowest - low / step), dtype),
    ]
    levels = graph.node("QuantizeLinear", [layer.output, *parameters], f"{name}_levels")
    rounded = graph.node("DequantizeLinear", [levels, *parameters], f"{name}_rounded")
    node.replace_input_with(index, rounded)


def _range_that_is_read(value: ir.Value) -> Range | None:
    """Beyond which all that read a value see the same; None where one does not clip."""
    found = [
        _range_that_is_read(node.outputs[0])
        if node.op_type in MONOTONE
        else _range(node)
        for node in value.consumers()
    ]
    ranges = [each for each in found if each is not None]
    if value.is_graph_output() or not ranges or len(ranges) < len(found):
        return None
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _range(node: ir.Node) -> Range | None:
    """What a quantizer of one step and 8 bits can represent; None for other nodes."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    step, zero = array_of(node.inputs[1]), array_of(operand(node, 2))
    if step is None or step.size > 1 or zero is None or zero.dtype not in LEVELS:
        return None
    lowest, highest = (level - int(zero.item()) for level in LEVELS[zero.dtype])
    return lowest * step.item(), highest * step.item()
