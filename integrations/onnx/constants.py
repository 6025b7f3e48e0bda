"""Lets runtimes compute once, when they load a file, what comes of constants alone."""

import onnx
from onnx import TensorProto

from cora_plugin.integrations.onnx.graph import Graph, attributes
from cora_plugin.integrations.onnx.moving import MOVING


def constants_by_arithmetic(graph: Graph) -> None:
    """Let arithmetic dequantize what other constants are computed from.

    A runtime keeps every DequantizeLinear for its kernels and computes none at load.
    OpenVINO (2026.4) makes a kernel of the product of two, too: it takes a transposed
    left factor for one that is not, and in bfloat16, which it chooses itself where the
    processor has it, its compiler divides by zero and ends the process.
    """
    for node in list(graph.nodes):
        if node.op_type != "DequantizeLinear" or not graph.is_constant(node.output[0]):
            continue
        readers = graph.readers(node.output[0])
        inner = [reader for reader in readers if _computes(graph, reader)]
        if inner:
            graph.redirect(node.output[0], _dequantized(graph, node), inner)


def _computes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node makes another constant, or moves one to a node that does."""
    if not graph.is_constant(node.output[0]):
        return False
    return node.op_type not in MOVING or any(
        _computes(graph, reader) for reader in graph.readers(node.output[0])
    )


def _dequantized(graph: Graph, node: onnx.NodeProto) -> str:
    values, scale = graph.known(node.input[0]), graph.known(node.input[1])
    name = f"{node.output[0]}_f"
    shape = [1] * values.ndim
    if scale.size > 1:
        shape[attributes(node).get("axis", 1)] = -1
    result = graph.node("Cast", [node.input[0]], name, to=TensorProto.FLOAT)
    zero = graph.value(node.input[2]) if len(node.input) > 2 else None
    if zero is not None and zero.any():
        offset = graph.constant(f"{name}_zero", zero.reshape(shape))
        result = graph.node("Sub", [result, offset], name)
    # A division, for OpenVINO takes integers times a scale for a weight to keep.
    levels = graph.constant(f"{name}_levels", 1 / scale.reshape(shape))
    return graph.node("Div", [result, levels], name)
