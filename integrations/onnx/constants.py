"""Has runtimes compute what depends on constants alone once, when they load a file."""

import onnx_ir as ir

from cora_plugin.integrations.onnx.graph import (
    Graph,
    array_of,
    known,
    operand,
    redirect,
)
from cora_plugin.integrations.onnx.moving import MOVING


def constants_by_arithmetic(graph: Graph) -> None:
    """Dequantize by arithmetic where other constants are computed from the result.

    A runtime keeps every DequantizeLinear for its kernels and computes none at load.
    OpenVINO (2026.4) makes a kernel of the product of two, too: it takes a transposed
    left factor for one that is not, and in bfloat16, which it chooses itself where the
    processor has it, its compiler divides by zero and ends the process.
    """
    for node in graph.nodes:
        output = node.outputs[0]
        if node.op_type != "DequantizeLinear" or output.const_value is None:
            continue
        inner = [reader for reader in output.consumers() if _computes(reader)]
        if inner:
            redirect(output, _dequantized(graph, node), inner)


def _computes(node: ir.Node) -> bool:
    """Whether a node makes another constant, or moves one to a node that does."""
    output = node.outputs[0]
    if output.const_value is None:
        return False
    return node.op_type not in MOVING or any(map(_computes, output.consumers()))


def _dequantized(graph: Graph, node: ir.Node) -> ir.Value:
    values, scale = known(node.inputs[0]), known(node.inputs[1])
    name = f"{node.outputs[0].name}_f"
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[node.attributes.get_int("axis", 1)] = -1
    result = graph.node("Cast", node.inputs[:1], name, to=ir.DataType.FLOAT)
    zero = array_of(operand(node, 2))
    if zero is not None and zero.any():
        offset = graph.constant(f"{name}_zero", zero.reshape(shape))
        result = graph.node("Sub", [result, offset], name)
    # A division, for OpenVINO takes integers times a scale for a weight to keep.
    levels = graph.constant(f"{name}_levels", 1 / scale.reshape(shape))
    return graph.node("Div", [result, levels], name)
