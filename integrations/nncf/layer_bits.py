"""Other bit widths for some of a model's layers."""

from collections.abc import Callable, Mapping
from typing import Any

from nncf import Dataset
from nncf.common.graph.graph import NNCFGraph, NNCFNode
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from cora_plugin.adapters.form import is_depthwise
from cora_plugin.integrations.nncf.bits import check_bits, set_bits
from cora_plugin.integrations.nncf.layers import (
    DIMENSIONS,
    WEIGHTED,
    beside_layers,
    layer_names,
    operation_of,
)
from cora_plugin.integrations.nncf.private import get_const_data_on_port, hooks_of
from cora_plugin.integrations.nncf.private import operator_metatypes as om
from cora_plugin.integrations.nncf.step import TorchStep
from cora_plugin.layer import by_layer
from cora_plugin.typed import check

Neighbours = Callable[[NNCFNode], list[NNCFNode]]


class LayerBits(TorchStep):
    """Other bit widths for some layers, right after NNCF placed its quantizers.

    Args:
        first_last: Bits of the first and the last layer's weight and of the activations
            that only they read; None leaves them.
        depthwise: Bits of depthwise convolutions' weights; None leaves them.
        layers: Bits of weights by layer name, as reports have it, or glob, over all
            others; the last that fits wins.
        others: Bits of weights that are no layer's, of embeddings and norms; None
            leaves them.
    """

    def __init__(
        self,
        first_last: int | None = None,
        depthwise: int | None = None,
        layers: Mapping[str, int] | None = None,
        others: int | None = None,
    ) -> None:
        if first_last is not None:
            check_bits("first_last_bits", first_last)
        if depthwise is not None:
            check_bits("depthwise_bits", depthwise)
        if others is not None:
            check_bits("other_bits", others)
        check(layers or {}, Mapping[str, Any], ("layer_bits",))
        for pattern, bits in (layers or {}).items():
            check_bits(f"layer_bits: {pattern}", bits)
        self.first_last = first_last
        self.depthwise = depthwise
        self.layers = layers or {}
        self.others = others

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: Dataset | None = None,
    ) -> Any:
        """Change the quantizers of NNCF's wrapped model, in place."""
        net = model.model
        ends = _ends(graph)
        nodes = [node for node in graph.topological_sort() if _is_layer(node)]
        names = layer_names(net, [node.node_name for node in nodes])
        chosen = by_layer("layer_bits", self.layers, list(names.values()))
        if self.others is not None:
            for node in filter(beside_layers, graph.get_all_nodes()):
                for quantizer, weight in _weights(net, graph, node):
                    set_bits(quantizer, self.others, weight)
        for node in nodes:
            for quantizer, weight in _weights(net, graph, node):
                bits = chosen.get(names[node.node_name])
                if bits is None and node in ends:
                    bits = self.first_last
                if bits is None and _is_depthwise(node, weight):
                    bits = self.depthwise
                if bits is not None:
                    set_bits(quantizer, bits, weight)
            if self.first_last is not None and node in ends:
                quantizer = _input_quantizer(net, graph, node)
                if quantizer is not None:
                    set_bits(quantizer, self.first_last)
        return model


def _is_layer(node: NNCFNode) -> bool:
    return node.metatype in WEIGHTED and bool(node.layer_attributes.constant_port_ids)


def _is_depthwise(node: NNCFNode, weight: Tensor) -> bool:
    if node.node_type not in DIMENSIONS:
        return False
    operation = operation_of(node)
    return is_depthwise(tuple(operation.layout(weight).shape), operation.groups)


def _weights(
    net: nn.Module, graph: NNCFGraph, node: NNCFNode
) -> list[tuple[BaseQuantizer, Tensor]]:
    """A layer's weight quantizers and what they quantize."""
    found = []
    for port in node.layer_attributes.constant_port_ids:
        for hook in _quantizers(net, "pre_hooks", node, port):
            weight = get_const_data_on_port(net, graph, node, port)
            found.append((hook, weight))
    return found


def _quantizers(
    net: nn.Module, place: str, node: NNCFNode, port: int
) -> list[BaseQuantizer]:
    """The quantizers in one place of the model."""
    hooks = hooks_of(net, place, node.node_name, port)
    return [hook for hook in hooks if isinstance(hook, BaseQuantizer)]


def _ends(graph: NNCFGraph) -> list[NNCFNode]:
    """The layers that no other layer comes before, or after."""
    layers = [node for node in graph.get_all_nodes() if _is_layer(node)]
    both: tuple[Neighbours, ...] = (graph.get_previous_nodes, graph.get_next_nodes)
    return [
        node
        for node in layers
        if not all(any(map(_is_layer, _reached(node, way, _never))) for way in both)
    ]


def _reached(
    start: NNCFNode, way: Neighbours, stop: Callable[[NNCFNode], bool]
) -> list[NNCFNode]:
    """Every node that a way leads to, not beyond those that stop it."""
    found: dict[int, NNCFNode] = {}
    waiting = list(way(start))
    while waiting:
        node = waiting.pop()
        if node.node_id not in found:
            found[node.node_id] = node
            if not stop(node):
                waiting += way(node)
    return list(found.values())


def _never(_: NNCFNode) -> bool:
    return False


def _computed_inputs(graph: NNCFGraph, node: NNCFNode) -> list[NNCFNode]:
    """The nodes before one that are no constants."""
    before: list[NNCFNode] = graph.get_previous_nodes(node)
    return [each for each in before if each.metatype not in om.CONST_NOOP_METATYPES]


def _input_quantizer(
    net: nn.Module, graph: NNCFGraph, layer: NNCFNode
) -> BaseQuantizer | None:
    """The quantizer of a layer's input, if no other layer reads what it quantizes."""
    edges = graph.get_input_edges(layer)
    nodes = [e.from_node for e in edges if e.input_port_id == 0]
    while len(nodes) == 1 and nodes[0].node_type not in om.QUANTIZE_NODE_TYPES:
        if _is_layer(nodes[0]):
            return None
        nodes = _computed_inputs(graph, nodes[0])
    if len(nodes) != 1:
        return None
    readers = _reached(nodes[0], graph.get_next_nodes, _is_layer)
    if [node for node in readers if _is_layer(node)] != [layer]:
        return None
    own = _quantizers(net, "pre_hooks", layer, 0)
    if own:
        return own[0]
    producers = _computed_inputs(graph, nodes[0])
    behind = [_quantizers(net, "post_hooks", each, 0) for each in producers]
    return behind[0][0] if len(behind) == 1 and behind[0] else None
