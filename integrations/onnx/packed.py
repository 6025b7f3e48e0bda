"""Weights of 4 bits and fewer as packed 4-bit integers."""

import numpy as np
import onnx
from onnx import TensorProto

from cora_plugin.integrations.onnx.graph import Array, Graph

RANGES = {
    (TensorProto.INT8, TensorProto.INT4): (-8, 7),
    (TensorProto.UINT8, TensorProto.UINT4): (0, 15),
}
"""What fits a 4-bit type, by the 8-bit type that is stored and the 4-bit one."""


def pack_weights(graph: Graph) -> None:
    """Store the integers behind each DequantizeLinear in the fewest bits ONNX has.

    An exporter writes integers of fewer than 8 bits as 8-bit ones behind a Clip that
    tells their width. 4 bits and fewer become INT4 or UINT4, the others stay as they
    are; the Clip goes, for stored integers are within its bounds.
    """
    for node in list(graph.nodes):
        if node.op_type != "DequantizeLinear":
            continue
        clip = graph.producer(node.input[0])
        if clip is None or clip.op_type != "Clip":
            continue
        values = graph.value(clip.output[0])
        if values is None:
            continue
        low, high = _bounds(graph, clip, values)
        zero = graph.value(node.input[2]) if len(node.input) > 2 else None
        stored = graph.initializers.get(clip.input[0])
        wide = TensorProto.UINT8 if values.dtype == np.uint8 else TensorProto.INT8
        kind = next(
            (
                narrow
                for (name, narrow), (least, most) in RANGES.items()
                if name == wide
                and least <= low
                and high <= most
                and (zero is None or (least <= zero.min() and zero.max() <= most))
            ),
            wide,
        )
        if kind == wide and stored is not None:
            if np.array_equal(values, graph.known(clip.input[0])):
                node.input[0] = clip.input[0]
                continue
        node.input[0] = graph.integers(f"{node.output[0]}_q", values, kind)
        if kind != wide and zero is not None:
            if zero.any():
                node.input[2] = graph.integers(f"{node.output[0]}_z", zero, kind)
            else:
                del node.input[2:]  # zero is the default


def _bounds(graph: Graph, clip: onnx.NodeProto, values: Array) -> tuple[int, int]:
    limits = np.iinfo(values.dtype)
    found = [limits.min, limits.max]
    for index, name in enumerate(clip.input[1:]):
        bound = graph.value(name) if name else None
        if bound is not None:
            found[index] = int(bound)
    return found[0], found[1]
