"""Rewrites OpenVINO's FakeQuantize in an ONNX graph to standard operators.

A FakeQuantize on a constant becomes integers behind a DequantizeLinear; any other a
QuantizeLinear and a DequantizeLinear, clipped where the integer type has more levels
than the quantizer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cora_plugin.integrations.onnx.graph import INT4, UINT4, Graph, array_of, known

TYPES = {
    (4, True): INT4,
    (4, False): UINT4,
    (8, True): np.dtype(np.int8),
    (8, False): np.dtype(np.uint8),
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
    def type(self) -> np.dtype[Any]:
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


def fake_quantize_to_qdq(graph: Graph) -> None:
    """Rewrite every FakeQuantize of a graph."""
    for node in graph.nodes:
        if node.op_type == "FakeQuantize":
            graph.replace(node, _rewritten(node, graph))


def _rewritten(node: ir.Node, graph: Graph) -> ir.Value:
    """The output of the DequantizeLinear that takes a FakeQuantize's place."""
    source, output = node.inputs[0], node.outputs[0].name
    low, high = (known(value).astype(np.float64) for value in node.inputs[1:3])
    grid = Grid.of(low, high, node.attributes["levels"].as_int())
    scale = graph.constant(f"{output}_scale", grid.scale)
    zero = graph.constant(f"{output}_zero_point", grid.zero_point, grid.type)
    axis: dict[str, Any] = {} if grid.axis is None else {"axis": grid.axis}
    values = array_of(source)
    if values is not None:
        integers = grid.integers(values.astype(np.float64))
        levels = graph.constant(f"{output}_quantized", integers, grid.type)
    else:
        if not grid.whole:
            for operator, bound in (("Max", low), ("Min", high)):
                value = bound.reshape(()) if bound.size == 1 else bound
                limit = graph.constant(f"{output}_{operator.lower()}", value)
                source = graph.node(operator, [source, limit], f"{output}_clipped")
        levels = graph.node(
            "QuantizeLinear", [source, scale, zero], f"{output}_quantized", **axis
        )
    return graph.node(
        "DequantizeLinear", [levels, scale, zero], f"{output}_restored", **axis
    )
