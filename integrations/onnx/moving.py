"""Puts rounding before and after operators that only move values.

Runtimes fuse a layer with the QuantizeLinear behind it and the DequantizeLinear before
it. An operator between, such as a Concat, hands values on as they are: rounding once
more beside it changes none of them.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.fold import LAYERS
from cora_plugin.integrations.onnx.graph import (
    Graph,
    known,
    producer,
    redirect,
    same_value,
)
from cora_plugin.integrations.onnx.padding import is_zero_padding

MOVING = ("Concat", "Flatten", "MaxPool", "Reshape", "Transpose")
"""Operators that hand values on as they are, beside padding with zeros."""

COPYING = ("reflect", "edge", "wrap")
"""Modes of a Pad that repeats values."""


def round_before_moving(graph: Graph) -> None:
    """Round the inputs of what only moves values, as its output is rounded.

    That changes no value, and lets the layer before it end in a QuantizeLinear.
    """
    ahead: list[ir.Node | None] = [
        node for node in graph.nodes if node.op_type == "QuantizeLinear"
    ]
    while ahead:
        rounding = ahead.pop()
        moving = None if rounding is None else producer(rounding.inputs[0])
        if rounding is None or moving is None or not _moves(moving):
            continue
        moved, parameters = moving.outputs[0], rounding.inputs[1:]
        if moved.is_graph_output():
            continue
        if not all(rounds_alike(rounding, reader) for reader in moved.consumers()):
            continue
        for index, source in enumerate(_moved(moving)):
            name = f"{source.name if source else ''}_rounded"
            levels = graph.node("QuantizeLinear", [source, *parameters], name)
            ahead.append(levels.producer())
            after = graph.node("DequantizeLinear", [levels, *parameters], name)
            moving.replace_input_with(index, after)


def round_after_moving(graph: Graph) -> None:
    """Round the output of what only moves values, as its inputs are rounded.

    That changes no value either, and lets the layer behind begin with a
    DequantizeLinear.
    """
    for node in graph.nodes:
        output = node.outputs[0]
        if not _moves(node) or output.const_value is not None:
            continue
        rounded = [producer(value) for value in _moved(node)]
        readers = [
            reader
            for reader in output.consumers()
            if reader.op_type in LAYERS or _moves(reader)
        ]
        first = rounded[0]
        if first is None or not readers:
            continue
        if not all(_restores_alike(first, source) for source in rounded):
            continue
        name, parameters = f"{output.name}_rounded", first.inputs[1:]
        levels = graph.node("QuantizeLinear", [output, *parameters], name)
        after = graph.node("DequantizeLinear", [levels, *parameters], name)
        redirect(output, after, readers)


def _moves(node: ir.Node) -> bool:
    if node.op_type == "Pad" and node.attributes.get_string("mode") in COPYING:
        return True
    return node.op_type in MOVING or is_zero_padding(node)


def _moved(node: ir.Node) -> Sequence[ir.Value | None]:
    """The inputs whose values a node hands on."""
    return node.inputs if node.op_type == "Concat" else node.inputs[:1]


def rounds_alike(one: ir.Node, other: ir.Node) -> bool:
    """Whether a node quantizes as a QuantizeLinear does."""
    return other.op_type == "QuantizeLinear" and _same_step(one, other)


def _restores_alike(one: ir.Node, other: ir.Node | None) -> bool:
    if other is None or other.op_type != "DequantizeLinear":
        return False
    return _same_step(one, other)


def _same_step(one: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes quantize by one scale and one zero point, equal ones."""
    if len(one.inputs) != len(other.inputs) or one.attributes != other.attributes:
        return False
    return all(
        same_value(a, b) and np.size(known(a)) == 1
        for a, b in zip(one.inputs[1:], other.inputs[1:], strict=True)
    )
