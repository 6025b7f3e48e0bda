"""Puts rounding before and after operators that only move values.

Runtimes fuse a layer with the QuantizeLinear behind it and the DequantizeLinear before
it. An operator between, such as a Concat, hands values on as they are: rounding once
more beside it changes none of them.
"""

import numpy as np
import onnx

from cora_plugin.integrations.onnx.fold import LAYERS
from cora_plugin.integrations.onnx.graph import Graph, attributes
from cora_plugin.integrations.onnx.padding import is_zero_padding

MOVING = ("Concat", "Flatten", "MaxPool", "Reshape", "Transpose")
"""Operators that hand values on as they are, beside padding with zeros."""

COPYING = (b"reflect", b"edge", b"wrap")
"""Modes of a Pad that repeats values."""


def round_before_moving(graph: Graph) -> None:
    """Round the inputs of what only moves values, as its output is rounded.

    That changes no value, and lets the layer before it end in a QuantizeLinear.
    """
    ahead = [node for node in graph.nodes if node.op_type == "QuantizeLinear"]
    while ahead:
        rounding = ahead.pop()
        moving = graph.producer(rounding.input[0])
        if moving is None or not _moves(graph, moving):
            continue
        readers = graph.readers(moving.output[0])
        if moving.output[0] in graph.outputs:
            continue
        if not all(rounds_alike(graph, rounding, reader) for reader in readers):
            continue
        count = len(moving.input) if moving.op_type == "Concat" else 1
        for index in range(count):
            source = moving.input[index]
            name = f"{source}_rounded"
            parameters = list(rounding.input[1:])
            levels = graph.node("QuantizeLinear", [source, *parameters], name)
            ahead.append(graph.maker(levels))
            moving.input[index] = graph.node(
                "DequantizeLinear", [levels, *parameters], name
            )


def round_after_moving(graph: Graph) -> None:
    """Round the output of what only moves values, as its inputs are rounded.

    That changes no value either, and lets the layer behind begin with a
    DequantizeLinear.
    """
    for node in list(graph.nodes):
        if not _moves(graph, node) or graph.is_constant(node.output[0]):
            continue
        count = len(node.input) if node.op_type == "Concat" else 1
        rounded = [graph.producer(name) for name in list(node.input)[:count]]
        readers = [
            reader
            for reader in graph.readers(node.output[0])
            if reader.op_type in LAYERS or _moves(graph, reader)
        ]
        first = rounded[0]
        if first is None or not readers:
            continue
        if not all(_restores_alike(graph, first, source) for source in rounded):
            continue
        name = f"{node.output[0]}_rounded"
        parameters = list(first.input)[1:]
        levels = graph.node("QuantizeLinear", [node.output[0], *parameters], name)
        after = graph.node("DequantizeLinear", [levels, *parameters], name)
        graph.redirect(node.output[0], after, readers)


def _moves(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type == "Pad" and attributes(node).get("mode", b"constant") in COPYING:
        return True
    return node.op_type in MOVING or is_zero_padding(graph, node)


def rounds_alike(graph: Graph, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """Whether a node quantizes as a QuantizeLinear does."""
    return other.op_type == "QuantizeLinear" and _same_step(graph, one, other)


def _restores_alike(
    graph: Graph, one: onnx.NodeProto, other: onnx.NodeProto | None
) -> bool:
    return (
        other is not None
        and other.op_type == "DequantizeLinear"
        and _same_step(graph, one, other)
    )


def _same_step(graph: Graph, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """Whether two nodes quantize by one scale and one zero point, equal ones."""
    if len(one.input) != len(other.input) or attributes(one) != attributes(other):
        return False
    return all(
        (value := graph.value(a)) is not None
        and np.size(value) == 1
        and graph.same_value(a, b)
        for a, b in zip(list(one.input)[1:], list(other.input)[1:], strict=True)
    )
