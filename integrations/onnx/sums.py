"""Rounds what residual sums add, where a model rounds only what layers read.

In `y = layer(x) + skip`, `skip` and `y` may be rounded for the layers that read them
and be float for the sum, so that no integer kernel can end at the layer. Here the sum
reads `skip` as those layers do, within [a, b]. If y is clipped to [c, d] for its
readers, they see the same if what the layer gives is clipped to [c − b, d − a]: a range
that takes no calibration. What is added is rounding, by the steps of `skip` and `y`.
"""

import numpy as np
import onnx

from cora_plugin.integrations.onnx.fold import layer_of
from cora_plugin.integrations.onnx.graph import Graph
from cora_plugin.integrations.onnx.moving import rounds_alike
from cora_plugin.integrations.onnx.steps import LEVELS

Range = tuple[float, float]

MONOTONE = ("Clip", "Relu")
"""Activations that may stand between a sum and its rounding."""


def round_sums(graph: Graph) -> None:
    """Give the layers before residual sums a quantizer, where a range is known."""
    # From the last one on: a sum that is read rounded by the next has a range, too.
    for node in reversed(list(graph.nodes)):
        if node.op_type != "Add" or graph.is_constant(node.output[0]):
            continue
        total = _range_that_is_read(graph, node.output[0])
        if total is None:
            continue
        for index, name in enumerate(node.input):
            node.input[index] = _as_layers_read_it(graph, name)
        for index in range(2):
            _round_layer(graph, node, index, total)


def _as_layers_read_it(graph: Graph, name: str) -> str:
    """A value after the one quantizer that it has; the value itself if it has none."""
    roundings = [r for r in graph.readers(name) if r.op_type == "QuantizeLinear"]
    if not roundings or _range(graph, roundings[0]) is None:
        return name
    if not all(rounds_alike(graph, roundings[0], other) for other in roundings):
        return name
    for reader in graph.readers(roundings[0].output[0]):
        if reader.op_type == "DequantizeLinear":
            return str(reader.output[0])
    return name


def _round_layer(graph: Graph, node: onnx.NodeProto, index: int, total: Range) -> None:
    """Round a summand that is a layer's output, where the other one is rounded."""
    name, other = node.input[index], graph.producer(node.input[1 - index])
    if layer_of(graph, graph.producer(name)) is None or not graph.read_once(name):
        return
    skip = None if other is None else _range(graph, other)
    if other is None or skip is None:
        return
    low, high = total[0] - skip[1], total[1] - skip[0]
    kind = graph.known(other.input[2]).dtype
    least, most = LEVELS[kind]
    step = (high - low) / (most - least)
    parameters = [
        graph.constant(f"{name}_step", step),
        graph.constant(f"{name}_zero", np.round(least - low / step), kind),
    ]
    levels = graph.node("QuantizeLinear", [name, *parameters], f"{name}_levels")
    node.input[index] = graph.node(
        "DequantizeLinear", [levels, *parameters], f"{name}_rounded"
    )


def _range_that_is_read(graph: Graph, name: str) -> Range | None:
    """Beyond which all that read a value see the same; None where one does not clip."""
    found = [
        _range_that_is_read(graph, node.output[0])
        if node.op_type in MONOTONE
        else _range(graph, node)
        for node in graph.readers(name)
    ]
    ranges = [each for each in found if each is not None]
    if name in graph.outputs or not ranges or len(ranges) < len(found):
        return None
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _range(graph: Graph, node: onnx.NodeProto) -> Range | None:
    """What a quantizer of one step and 8 bits can represent; None for other nodes."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    step = graph.value(node.input[1])
    zero = graph.value(node.input[2]) if len(node.input) > 2 else None
    if step is None or step.size > 1 or zero is None or zero.dtype not in LEVELS:
        return None
    least, most = (level - int(zero.item()) for level in LEVELS[zero.dtype])
    return least * step.item(), most * step.item()
