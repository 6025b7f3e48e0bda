"""Folds an adapter's branch into the weight of the layer that it stands beside.

`W ∗ x + B ∗ (A ∗ x) = (W + BA) ∗ x`: the graph is left with one layer whose weight is
computed from constants, which runtimes do once, when they load the file.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.graph import (
    Graph,
    array_of,
    operand,
    producer,
    read_once,
    same_value,
)

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators with a weight, their second input, that have integer kernels."""

TRANSPOSED = "ConvTranspose"
"""One that has none, so that it is folded and stays float."""

REPEATED = ("Clip", "DequantizeLinear", "Max", "Min", "Pad", "QuantizeLinear")
"""What exporters may write once for a layer and once more for its branch."""


@dataclass(frozen=True)
class Layer:
    """A layer of the graph whose weight is constant."""

    node: ir.Node
    shape: tuple[int, ...]

    @property
    def source(self) -> ir.Value | None:
        """What it is applied to."""
        return self.node.inputs[0]

    @property
    def weight(self) -> ir.Value:
        """Its weight."""
        return cast("ir.Value", self.node.inputs[1])

    @property
    def bias(self) -> ir.Value | None:
        """Its bias."""
        return operand(self.node, 2)

    @property
    def output(self) -> ir.Value:
        """What it computes."""
        return self.node.outputs[0]

    @property
    def axis(self) -> int:
        """The weight's axis of output channels."""
        if self.node.op_type == "Conv":
            return 0
        return 0 if self.node.attributes.get_int("transB", 0) else 1

    @property
    def operation(self) -> dict[str, Any]:
        """All but the weight that decides what it computes."""
        found: dict[str, Any] = {"op": self.node.op_type}
        if self.node.op_type in ("Conv", TRANSPOSED):
            size = len(self.shape) - 2
            found |= {"group": 1, "strides": (1,) * size, "dilations": (1,) * size}
            found |= {"output_padding": (0,) * size}
            found |= {"pads": (0,) * 2 * size, "auto_pad": "NOTSET"}
            found |= {"kernel_shape": self.shape[2:]}
        elif self.node.op_type == "Gemm":
            found |= {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        return found | {a.name: a.value for a in self.node.attributes.values()}

    @property
    def mixes_channels(self) -> bool:
        """Whether it sees one position at a time and keeps them all."""
        if self.node.op_type != "Conv":
            return True
        operation = self.operation
        operation.pop("group")
        plain = Layer(ir.node("Conv", []), self.shape).operation
        plain.pop("group")
        return operation == plain and all(n == 1 for n in self.shape[2:])


def layer_of(node: ir.Node | None) -> Layer | None:
    """The layer that a node is, if it is one and its weight alone is constant."""
    return _layer_among(LAYERS, node)


def _layer_among(operators: tuple[str, ...], node: ir.Node | None) -> Layer | None:
    if node is None or node.op_type not in operators or node.domain:
        return None
    weight = array_of(node.inputs[1])
    if node.outputs[0].const_value is not None:
        return None
    if weight is None or weight.ndim < 2:
        return None
    if node.op_type == "MatMul" and weight.ndim != 2:
        return None
    return Layer(node, weight.shape)


def fold_branches(graph: Graph) -> None:
    """Fold every branch.

    A branch is a layer without a bias, or two of which the second mixes channels,
    applied to what its layer is applied to, in the same way, and added to its output.
    """
    for node in graph.nodes:
        if node.op_type == "Add":
            _fold(graph, node)


def _fold(graph: Graph, add: ir.Node) -> None:
    for main, share in (add.inputs, add.inputs[::-1]):
        layer, last = _foldable(producer(main)), _foldable(producer(share))
        if layer is None or last is None or main is share:
            continue
        if not (read_once(main) and read_once(share)):
            continue
        branch = _branch_weight(graph, layer, last)
        if branch is None:
            continue
        name = f"{add.outputs[0].name}_weight"
        total = graph.node("Add", [layer.weight, branch], name)
        layer.node.replace_input_with(1, total)
        graph.replace(add, layer.output)
        return


def _foldable(node: ir.Node | None) -> Layer | None:
    return _layer_among((*LAYERS, TRANSPOSED), node)


def _branch_weight(graph: Graph, layer: Layer, last: Layer) -> ir.Value | None:
    """The weight that a branch amounts to; None if it is not one beside the layer."""
    if last.bias is not None:
        return None
    first = _foldable(producer(last.source))
    if first is not None and (first.bias is not None or not read_once(last.source)):
        first = None
    if layer.node.op_type not in ("Conv", TRANSPOSED):
        return _branch_matrix(graph, layer, first, last)
    if layer.shape == last.shape and _parallel(layer, last):
        return last.weight
    if first is None or last.node.op_type != "Conv" or not last.mixes_channels:
        return None
    if layer.node.op_type == TRANSPOSED:
        return _branch_transposed(graph, layer, first, last)
    return _branch_kernel(graph, layer, first, last)


def _branch_kernel(
    graph: Graph, layer: Layer, first: Layer, last: Layer
) -> ir.Value | None:
    rank, groups = last.shape[1], layer.operation["group"]
    if not (
        first.shape == (groups * rank, *layer.shape[1:])
        and last.shape[0] == layer.shape[0]
        and last.operation["group"] == groups
        and _parallel(layer, first)
    ):
        return None
    # [g, r, k] and [g, m/g, r]
    a = _reshape(graph, first.weight, (groups, rank, -1))
    b = _reshape(graph, last.weight, (groups, layer.shape[0] // groups, rank))
    product = graph.node("MatMul", [b, a], f"{layer.weight.name}_branch")
    return _reshape(graph, product, layer.shape)


def _branch_transposed(
    graph: Graph, layer: Layer, first: Layer, last: Layer
) -> ir.Value | None:
    """The same of weights [n, m/g, *kernel]."""
    rank, groups = last.shape[1], layer.operation["group"]
    inputs, outputs, *kernel = layer.shape
    if not (
        first.shape == (inputs, rank, *kernel)
        and last.shape[0] == groups * outputs
        and last.operation["group"] == groups
        and _parallel(layer, first)
    ):
        return None
    # [g, n/g, r, k] and [g, 1, m/g, r]
    a = _reshape(graph, first.weight, (groups, inputs // groups, rank, -1))
    b = _reshape(graph, last.weight, (groups, 1, outputs, rank))
    product = graph.node("MatMul", [b, a], f"{layer.weight.name}_branch")
    return _reshape(graph, product, layer.shape)


def _branch_matrix(
    graph: Graph, layer: Layer, first: Layer | None, last: Layer
) -> ir.Value | None:
    """The same of matrix products, y = x W with W [n, m], by Gemm or MatMul."""
    parts = [last] if first is None else [first, last]
    if not all(_is_product(part) for part in (layer, *parts)):
        return None
    if not _same(layer.source, parts[0].source):
        return None
    sides = [part.shape[::-1] if part.axis == 0 else part.shape for part in parts]
    whole = layer.shape[::-1] if layer.axis == 0 else layer.shape
    if (sides[0][0], sides[-1][1]) != whole:
        return None
    weight = _columns(graph, parts[0])
    for part in parts[1:]:
        name = f"{layer.weight.name}_branch"
        weight = graph.node("MatMul", [weight, _columns(graph, part)], name)
    if layer.axis == 0:
        weight = graph.node("Transpose", [weight], f"{weight.name}_rows", perm=[1, 0])
    return weight


def _is_product(layer: Layer) -> bool:
    if layer.node.op_type in ("Conv", TRANSPOSED):
        return False
    operation = layer.operation
    return (operation.get("alpha", 1), operation.get("transA", 0)) == (1, 0)


def _columns(graph: Graph, layer: Layer) -> ir.Value:
    if layer.axis == 1:
        return layer.weight
    name = f"{layer.weight.name}_columns"
    return graph.node("Transpose", [layer.weight], name, perm=[1, 0])


def _reshape(graph: Graph, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    wanted = graph.constant(f"{value.name}_shape", shape, np.int64)
    return graph.node("Reshape", [value, wanted], f"{value.name}_reshaped")


def _parallel(layer: Layer, other: Layer) -> bool:
    """Whether two layers do the same to the same input, but for their weights."""
    same = layer.operation == other.operation
    return same and _same(layer.source, other.source)


def _same(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether two values are one, or made of one in the same way."""
    if left is right or same_value(left, right):
        return True
    one, other = producer(left), producer(right)
    return (
        one is not None
        and other is not None
        and one.op_type == other.op_type
        and one.op_type in REPEATED
        and one.attributes == other.attributes
        and len(one.inputs) == len(other.inputs)
        and all(map(_same, one.inputs, other.inputs))
    )
