"""Weights of 4 bits and fewer as packed 4-bit integers."""

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.graph import (
    INT4,
    UINT4,
    Array,
    Graph,
    array_of,
    known,
    operand,
    producer,
)

NARROW = {np.dtype(np.int8): (INT4, -8, 7), np.dtype(np.uint8): (UINT4, 0, 15)}
"""The 4-bit type and what fits it, by the 8-bit type that is stored."""


def pack_weights(graph: Graph) -> None:
    """Store the integers behind each DequantizeLinear in the fewest bits ONNX has.

    An exporter writes integers of fewer than 8 bits as 8-bit ones behind a Clip that
    tells their width. 4 bits and fewer become INT4 or UINT4, the others stay as they
    are; the Clip goes, for stored integers are within its bounds.
    """
    for node in graph.nodes:
        clip = producer(operand(node, 0))
        if node.op_type != "DequantizeLinear" or clip is None or clip.op_type != "Clip":
            continue
        values = array_of(clip.outputs[0])
        if values is None:
            continue
        zero, stored = array_of(operand(node, 2)), clip.inputs[0]
        dtype = _type(_bounds(clip, values), values, zero)
        if dtype == values.dtype and stored is not None and stored.is_initializer():
            if np.array_equal(values, known(stored)):
                node.replace_input_with(0, stored)
                continue
        name = node.outputs[0].name
        node.replace_input_with(0, graph.constant(f"{name}_q", values, dtype))
        if dtype != values.dtype and zero is not None:
            if zero.any():
                node.replace_input_with(2, graph.constant(f"{name}_z", zero, dtype))
            else:
                node.resize_inputs(2)  # zero is the default


def _type(bounds: tuple[int, int], values: Array, zero: Array | None) -> np.dtype:
    """The type that a weight and its zero points fit."""
    if values.dtype not in NARROW:
        return values.dtype
    narrow, lowest, highest = NARROW[values.dtype]
    ends = [*bounds, *([] if zero is None else [zero.min(), zero.max()])]
    return narrow if lowest <= min(ends) and max(ends) <= highest else values.dtype


def _bounds(clip: ir.Node, values: Array) -> tuple[int, int]:
    limits = np.iinfo(values.dtype)
    low, high = array_of(operand(clip, 1)), array_of(operand(clip, 2))
    return (
        limits.min if low is None else int(low),
        limits.max if high is None else int(high),
    )
