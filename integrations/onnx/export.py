"""Rewrites an exported file."""

import os

import onnx

from cora_plugin.integrations.onnx.constants import constants_by_arithmetic
from cora_plugin.integrations.onnx.graph import TRACED_OPSET as TRACED_OPSET
from cora_plugin.integrations.onnx.graph import Graph
from cora_plugin.integrations.onnx.int8 import for_int8_kernels
from cora_plugin.integrations.onnx.packed import pack_weights


def rewrite(path: str | os.PathLike[str], int8_kernels: bool) -> None:
    """Pack the weights of a QCDQ file, and bring it to the form of int8 kernels."""
    graph = Graph(onnx.load(path))
    if int8_kernels:
        for_int8_kernels(graph)
    else:
        pack_weights(graph)
        constants_by_arithmetic(graph)
    onnx.save(graph.finish(), path)
