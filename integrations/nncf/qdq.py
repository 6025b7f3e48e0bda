"""Rewrites OpenVINO's FakeQuantize in an ONNX model to standard operators.

A FakeQuantize on a constant becomes integers behind a DequantizeLinear; any other a
QuantizeLinear and a DequantizeLinear, clipped where the integer type has more levels
than the quantizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
"""The first whose DequantizeLinear takes 4-bit integers."""

TYPES = {
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
}
"""Integer types by width and signedness."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """What a FakeQuantize rounds to: `(q − zero_point) · scale`, q from low to high.

    `low`, `high` and `scale` are [] or [c] along `axis`; `width` is that of the type.
    """

    scale: Array
    zero_point: Array
    low: int
    high: int
    axis: int | None
    width: int
    signed: bool

    @classmethod
    def of(cls, low: Array, high: Array, levels: int) -> "Grid":
        """The grid of an input range, constants that broadcast with the input."""
        step = (high - low) / (levels - 1)
        offset = np.round(low / step)  # q of `low` where zero is exact
        width = 4 if levels <= 2**4 else 8
        # Signed where every channel begins at the same negative level, as symmetric
        # quantizers do; others count from 0 and have zero points.
        first = int(offset.flat[0])
        signed = bool((offset == first).all() and -(2 ** (width - 1)) <= first < 0)
        signed = signed and first + levels <= 2 ** (width - 1)
        start = first if signed else 0
        zero = np.zeros_like(offset) if signed else -offset
        axis = int(np.argmax(step.shape)) if step.size > 1 else None
        shape = () if axis is None else (-1,)
        return cls(
            step.reshape(shape),
            zero.reshape(shape),
            start,
            start + levels - 1,
            axis,
            width,
            signed,
        )

    @property
    def type(self) -> int:
        """The integer type of ONNX."""
        return TYPES[self.width, self.signed]

    @property
    def whole(self) -> bool:
        """Whether the grid has all levels of the type."""
        return bool(self.high - self.low + 1 == 2**self.width)

    def integers(self, values: Array) -> npt.NDArray[np.int64]:
        """The levels nearest to values."""
        shape = [1] * values.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        levels = np.round(values / self.scale.reshape(shape))
        levels += self.zero_point.reshape(shape)
        return np.clip(levels, self.low, self.high).astype(np.int64)


def fake_quantize_to_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite every FakeQuantize of a traced model, in place.

    Args:
        model: An ONNX model whose operators mean the same in opset 21 as in its own.
    """
    graph = model.graph
    constants = _constants(graph)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "FakeQuantize":
            nodes += _rewrite(node, constants, graph)
        else:
            nodes.append(node)
    nodes = _used(nodes, graph)
    del graph.node[:]
    graph.node.extend(nodes)
    needed = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.ir_version = max(model.ir_version, 10)
    onnx.checker.check_model(model)
    return model


def _constants(graph: onnx.GraphProto) -> dict[str, Array]:
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        # The tracer hides some initializers behind an Identity.
        elif node.op_type == "Identity" and node.input[0] in found:
            found[node.output[0]] = found[node.input[0]]
    return found


def _rewrite(
    node: onnx.NodeProto, constants: Mapping[str, Array], graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    source, output = node.input[0], node.output[0]
    low, high = (constants[name].astype(np.float64) for name in node.input[1:3])
    grid = Grid.of(low, high, helper.get_node_attr_value(node, "levels"))
    scale, zero = f"{output}_scale", f"{output}_zero_point"
    graph.initializer.append(
        numpy_helper.from_array(np.asarray(grid.scale, np.float32), scale)
    )
    graph.initializer.append(_integers(zero, grid, np.asarray(grid.zero_point)))
    axis: dict[str, Any] = {} if grid.axis is None else {"axis": grid.axis}
    if source in constants:
        stored = f"{output}_quantized"
        values = grid.integers(constants[source].astype(np.float64))
        graph.initializer.append(_integers(stored, grid, values))
        return [
            helper.make_node(
                "DequantizeLinear", [stored, scale, zero], [output], **axis
            )
        ]
    nodes = []
    if not grid.whole:
        bounds = []
        for name, bound in (("low", low), ("high", high)):
            bounds.append(f"{output}_{name}")
            value = bound.reshape(()) if bound.size == 1 else bound
            graph.initializer.append(
                numpy_helper.from_array(np.asarray(value, np.float32), bounds[-1])
            )
        raised, clipped = f"{output}_raised", f"{output}_clipped"
        nodes.append(helper.make_node("Max", [source, bounds[0]], [raised]))
        nodes.append(helper.make_node("Min", [raised, bounds[1]], [clipped]))
        source = clipped
    stored = f"{output}_quantized"
    inputs = [source, scale, zero]
    nodes.append(helper.make_node("QuantizeLinear", inputs, [stored], **axis))
    inputs = [stored, scale, zero]
    nodes.append(helper.make_node("DequantizeLinear", inputs, [output], **axis))
    return nodes


def _integers(
    name: str, grid: Grid, values: npt.NDArray[np.generic]
) -> onnx.TensorProto:
    """An initializer of the grid's type; 4-bit integers two a byte, the first low."""
    flat = values.reshape(-1).astype(np.int64)
    if grid.width == 8:
        raw = flat.astype(np.int8 if grid.signed else np.uint8).tobytes()
    else:
        nibbles = (flat & 0xF).astype(np.uint8)
        nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
        raw = (nibbles[::2] | (nibbles[1::2] << 4)).tobytes()
    return helper.make_tensor(name, grid.type, values.shape, raw, raw=True)


def _used(nodes: list[onnx.NodeProto], graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Drop nodes that nothing reads, such as the constants of what was rewritten."""
    wanted = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]
