"""Signed activations beside operators that move values, written as unsigned ones."""

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.graph import (
    Graph,
    array_of,
    operand,
    producer,
    same_value,
)

MOVING = ("Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that onnxruntime copies a quantizer across."""

OFFSET = 128
"""From an 8-bit integer to the unsigned one of the same level."""


def unsigned_beside_moving(graph: Graph) -> None:
    """Count the levels of signed quantizers beside moving operators from 0.

    onnxruntime (1.31) copies such a quantizer to the other side of the operator. In
    files of opset 21 it gives the copy no zero point but the signed type, and then
    refuses what it has made. The values are the same: q becomes q + 128, with a zero
    point of 128.
    """
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or array_of(node.inputs[0]) is not None:
            continue
        zero = array_of(operand(node, 2))
        if zero is None or zero.dtype != np.int8:
            continue
        readers = list(node.outputs[0].consumers())
        alone = all(_restores(each, node) for each in readers)
        if not alone or node.outputs[0].is_graph_output() or not _beside(node, readers):
            continue
        moved = zero.astype(np.int16) + OFFSET
        name = f"{node.outputs[0].name}_unsigned_zero"
        point = graph.constant(name, moved, np.uint8)
        for each in (node, *readers):
            each.replace_input_with(2, point)


def _restores(node: ir.Node, rounding: ir.Node) -> bool:
    if node.op_type != "DequantizeLinear":
        return False
    return same_value(operand(node, 2), operand(rounding, 2))


def _beside(node: ir.Node, readers: list[ir.Node]) -> bool:
    before = producer(node.inputs[0])
    behind = (reader for each in readers for reader in each.outputs[0].consumers())
    return (before is not None and before.op_type in MOVING) or any(
        reader.op_type in MOVING or _becomes_gemm(reader) for reader in behind
    )


def _becomes_gemm(node: ir.Node) -> bool:
    """Whether onnxruntime fuses a node with its bias, with a Reshape at either side."""
    readers = node.outputs[0].consumers()
    return node.op_type == "MatMul" and any(each.op_type == "Add" for each in readers)
