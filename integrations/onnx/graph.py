"""An editor for ONNX graphs: what is constant, who reads what, new nodes, an end."""

from collections import Counter
from collections.abc import Iterable
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

OPSET = 21
"""The first whose DequantizeLinear and Cast take 4-bit integers."""

TRACED_OPSET = 20
"""The last that torch's tracing exporter writes; from it to 21 operators only widen."""

IR_VERSION = 10
"""The first that knows 4-bit integers."""

Array = npt.NDArray[Any]


class Graph:
    """A model's graph while it is edited; `finish` gives it back.

    Nodes may be added in any order. Subgraphs are left alone.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}
        self._makers: dict[str, onnx.NodeProto] = {
            name: node for node in self.nodes for name in node.output
        }
        self._names = {i.name for i in model.graph.input}
        self._names |= self._makers.keys() | self.initializers.keys()
        self._values: dict[str, Array | None] = {}

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a value; None for inputs and initializers."""
        return self._makers.get(name)

    def maker(self, name: str) -> onnx.NodeProto:
        """The node that computes a value, which is known to have one."""
        node: onnx.NodeProto = self._makers[name]
        return node

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return [node for node in self.nodes if name in node.input]

    def read_once(self, name: str) -> bool:
        """Whether one node reads a value, and nothing outside of the graph."""
        return name not in self.outputs and len(self.readers(name)) == 1

    def value(self, name: str) -> Array | None:
        """A value that depends on no input of the graph, else None."""
        # With a stack of our own: a network is deeper than Python's.
        wanted = [name]
        while wanted:
            node = self._makers.get(wanted[-1])
            inputs = (
                [] if wanted[-1] in self.initializers or node is None else node.input
            )
            missing = [key for key in inputs if key and key not in self._values]
            hopeless = any(self._values.get(key, key) is None for key in inputs)
            if wanted[-1] in self._values:
                wanted.pop()
            elif missing and not hopeless:
                wanted.append(missing[0])
            else:
                found = None if hopeless else self._evaluate(wanted[-1])
                self._values[wanted.pop()] = found
        return self._values[name]

    def known(self, name: str) -> Array:
        """A value that is known to be constant."""
        value = self.value(name)
        if value is None:
            raise KeyError(name)
        return value

    def same_value(self, left: str, right: str) -> bool:
        """Whether two values are constants, and equal."""
        one, other = self.value(left), self.value(right)
        return one is not None and other is not None and np.array_equal(one, other)

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on no input of the graph."""
        return self.value(name) is not None

    def _evaluate(self, name: str) -> Array | None:
        if name in self.initializers:
            return numpy_helper.to_array(self.initializers[name])
        node = self.producer(name)
        if node is None or node.domain or node.op_type.startswith(("Random", "Bern")):
            return None
        if any(attribute.HasField("g") for attribute in node.attribute):
            return None
        feeds = {key: self._values[key] for key in node.input if key}
        graph = helper.make_graph(
            [node],
            "constant",
            [helper.make_value_info(key, onnx.TypeProto()) for key in feeds],
            [helper.make_value_info(key, onnx.TypeProto()) for key in node.output],
        )
        # The types of the values are those of the fed arrays.
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        results: list[Array] = ReferenceEvaluator(model).run(None, feeds)  # type: ignore[assignment]
        self._values.update(zip(node.output, results, strict=True))
        return self._values[name]

    def fresh(self, name: str) -> str:
        """A name like `name` that the graph does not have yet."""
        found, count = name, 1
        while found in self._names:
            count += 1
            found = f"{name}_{count}"
        self._names.add(found)
        return found

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Add an initializer; returns its name."""
        found = self.fresh(name)
        array = np.asarray(value, dtype)
        self.initializers[found] = numpy_helper.from_array(array, found)
        return found

    def integers(self, name: str, values: Array, kind: int) -> str:
        """Add an initializer of an integer type, packed at 4 bits; returns its name."""
        found = self.fresh(name)
        self.initializers[found] = integer_tensor(found, values, kind)
        return found

    def node(
        self, kind: str, inputs: Iterable[str], output: str, **attributes: Any
    ) -> str:
        """Add a node with one output; returns the output's name."""
        found = self.fresh(output)
        node = helper.make_node(kind, list(inputs), [found], **attributes)
        self.nodes.append(node)
        self._makers[found] = node
        return found

    def redirect(self, old: str, new: str, readers: Iterable[onnx.NodeProto]) -> None:
        """Let nodes read `new` where they read `old`."""
        for node in readers:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def supersede(self, old: onnx.NodeProto, new: onnx.NodeProto) -> None:
        """Drop a node with one output and let another compute that value."""
        self.nodes.remove(old)
        del self._makers[new.output[0]]
        new.output[0] = old.output[0]
        self._makers[new.output[0]] = new
        # What was not constant may be so now.
        self._values = {k: v for k, v in self._values.items() if v is not None}

    def prune(self) -> None:
        """Drop the nodes that no output depends on, which would count as readers."""
        needed: set[str] = set()
        ahead = list(self.outputs)
        while ahead:
            name = ahead.pop()
            if name not in needed:
                needed.add(name)
                node = self.producer(name)
                ahead.extend([] if node is None else _reads(node))
        self.nodes = [node for node in self.nodes if needed & set(node.output)]
        self.initializers = {k: t for k, t in self.initializers.items() if k in needed}

    def finish(self) -> onnx.ModelProto:
        """Write the edited graph back: only what is needed, in order, checked."""
        self.prune()
        self._share_constants()
        makers = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        order = TopologicalSorter(
            {
                index: sorted({makers[name] for name in _reads(node) if name in makers})
                for index, node in enumerate(self.nodes)
            }
        )
        graph = self.model.graph
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes[index] for index in order.static_order())
        graph.initializer.extend(self.initializers.values())
        domains = {node.domain for node in self.nodes} - {"", "ai.onnx"}
        others = [o for o in self.model.opset_import if o.domain in domains]
        del self.model.opset_import[:]
        self.model.opset_import.append(helper.make_opsetid("", OPSET))
        self.model.opset_import.extend(others)
        self.model.ir_version = max(self.model.ir_version, IR_VERSION)
        onnx.checker.check_model(self.model)
        return self.model

    def _share_constants(self) -> None:
        """Store equal constants once, the zero points of all layers for one."""
        first: dict[bytes, str] = {}
        shared = {}
        for name, tensor in self.initializers.items():
            bare = TensorProto()
            bare.CopyFrom(tensor)
            bare.name = ""
            same = first.setdefault(bare.SerializeToString(), name)
            if same != name and name not in self.outputs:
                shared[name] = same
        for node in self.nodes:
            for index, name in enumerate(node.input):
                node.input[index] = shared.get(name, name)
        self.initializers = {
            k: t for k, t in self.initializers.items() if k not in shared
        }


def integer_tensor(name: str, values: Array, kind: int) -> TensorProto:
    """A tensor of an integer type; 4-bit integers two a byte, the first low."""
    flat = np.asarray(values).reshape(-1).astype(np.int64)
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        nibbles = (flat & 0xF).astype(np.uint8)
        nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
        raw = (nibbles[::2] | (nibbles[1::2] << 4)).tobytes()
    else:
        raw = flat.astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
    return helper.make_tensor(name, kind, np.shape(values), raw, raw=True)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.node)


def _reads(node: onnx.NodeProto) -> set[str]:
    """The values that a node reads, its subgraphs' included."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                found |= _reads(inner)
    return found
