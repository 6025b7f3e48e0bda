"""Edits ONNX graphs, on onnx-ir: what is constant, new nodes, and a valid end."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import Sequential
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
    TopologicalSortPass,
)

OPSET = 21
"""The first whose DequantizeLinear and Cast take 4-bit integers."""

IR_VERSION = 10
"""The first that knows 4-bit integers."""

INT4 = ir.DataType.INT4.numpy()
UINT4 = ir.DataType.UINT4.numpy()

Array = npt.NDArray[Any]


class Graph:
    """A model's graph while it is edited; `finish` gives it back.

    Values that depend on no input of the graph have a `const_value`, which `array_of`
    reads. Nodes may be added in any order. Subgraphs are left alone.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = ir.from_proto(model)
        self._graph = self._model.graph
        self._graph.opset_imports[""] = OPSET
        self._names = {value.name for value in self._graph.inputs}
        self._names |= self._graph.initializers.keys()
        for node in self._graph:
            self._names |= {value.name for value in node.outputs}
            self._compute(node)

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes at this moment."""
        return list(self._graph)

    def constant(
        self, name: str, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32
    ) -> ir.Value:
        """Add an initializer; `INT4` and `UINT4` are stored two a byte."""
        tensor = ir.Tensor(np.asarray(value).astype(dtype), name=self._fresh(name))
        added = ir.Value(name=tensor.name, const_value=tensor)
        self._graph.register_initializer(added)
        return added

    def node(
        self,
        operator: str,
        inputs: Iterable[ir.Value | None],
        output: str,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output; returns the output."""
        added = ir.Value(name=self._fresh(output))
        # Nodes without a name get one, which takes space.
        node = ir.node(operator, list(inputs), attributes, outputs=[added], name="")
        self._graph.append(node)
        self._compute(node)
        return added

    def replace(self, old: ir.Node, new: ir.Value) -> None:
        """Drop a node with one output, whose name and readers go to another value."""
        ir.convenience.replace_nodes_and_values(
            self._graph, old, [old], [], old.outputs, [new]
        )
        for reader in new.consumers():
            self._compute(reader)

    def prune(self) -> None:
        """Drop the nodes that no output depends on, which would count as readers."""
        # Sorted, for what drops them goes through the nodes once, from the last one.
        Sequential(TopologicalSortPass(), RemoveUnusedNodesPass())(self._model)

    def finish(self) -> onnx.ModelProto:
        """The edited model: only what is needed, equal constants once, checked."""
        self.prune()
        of_any_size = DeduplicateInitializersPass(size_limit=2**31)
        Sequential(of_any_size, RemoveUnusedOpsetsPass())(self._model)
        model = ir.to_proto(self._model)
        model.ir_version = max(model.ir_version, IR_VERSION)
        del model.graph.value_info[:]  # of the traced graph
        onnx.checker.check_model(model)
        return model

    def _fresh(self, name: str) -> str:
        """A name like `name` that the graph does not have yet."""
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}_{count}"
        self._names.add(found)
        return found

    def _compute(self, node: ir.Node) -> None:
        """Compute what a node and its readers make of constants alone."""
        ahead = [node]
        while ahead:
            node = ahead.pop()
            if not _is_computable(node):
                continue
            proto = ir.serde.serialize_node(node)
            function = onnx.FunctionProto(
                node=[proto],
                input=proto.input,
                output=proto.output,
                opset_import=[helper.make_opsetid("", OPSET)],
            )
            arrays = [array_of(value) for value in node.inputs]
            if node.op_type in ("DequantizeLinear", "Cast"):
                arrays = [_of_eight_bits(array) for array in arrays]
            feeds = dict(zip(proto.input, arrays, strict=True))
            results = ReferenceEvaluator(function).run(None, feeds, {})
            for value, result in zip(node.outputs, results, strict=True):
                value.const_value = ir.Tensor(result)
            ahead += node.successors()


def _of_eight_bits(array: Array | None) -> Array | None:
    """The same integers in a type that every ONNX's evaluator reads.

    That of ONNX 1.17, the last that QONNX allows in Python 3.10, has 4-bit types of its
    own.
    """
    wider = {INT4: np.int8, UINT4: np.uint8}
    if array is None or array.dtype not in wider:
        return array
    return array.astype(wider[array.dtype])


def _is_computable(node: ir.Node) -> bool:
    """Whether a node has constant inputs alone, and outputs that are not known yet."""
    if node.domain or node.op_type.startswith(("Random", "Bern")):
        return False
    if any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
        return False
    return node.outputs[0].const_value is None and all(
        value is None or value.const_value is not None for value in node.inputs
    )


def array_of(value: ir.Value | None) -> Array | None:
    """A value that depends on no input of the graph, else None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def known(value: ir.Value | None) -> Array:
    """A value that is known to be constant."""
    array = array_of(value)
    if array is None:
        raise ValueError(f"{value} is no constant")
    return array


def same_value(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether two values are constants, and equal."""
    one, other = array_of(left), array_of(right)
    return one is not None and other is not None and np.array_equal(one, other)


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value; None for inputs and initializers."""
    return None if value is None else value.producer()


def read_once(value: ir.Value | None) -> bool:
    """Whether one node reads a value, and nothing outside of the graph."""
    if value is None or value.is_graph_output():
        return False
    return len(value.consumers()) == 1


def redirect(old: ir.Value, new: ir.Value, readers: Iterable[ir.Node]) -> None:
    """Let nodes read `new` where they read `old`."""
    chosen = set(readers)
    for reader, index in old.uses():
        if reader in chosen:
            reader.replace_input_with(index, new)
