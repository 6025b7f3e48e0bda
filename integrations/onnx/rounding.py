"""Shifts that undo the mean error of rounding merged weights to 8 bits.

An exporter that knows such shifts has the model add them behind its layers, and says
which initializers they are. They are right only for weights that are rounded, which
shows last: until then each is noted at its layer's node, in the unit of its outputs.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.fold import Layer, layer_of
from cora_plugin.integrations.onnx.graph import (
    Array,
    Graph,
    array_of,
    producer,
    read_once,
)

log = logging.getLogger(__name__)

MOST_LOST = 0.1
"""The part of a shift that an int32 bias may lose without a warning."""

_KEY = "rounding shift"


@dataclass(frozen=True)
class RoundingShift:
    """What a layer's outputs gain if its weight is rounded, [m], and its name."""

    name: str
    values: Array


def take_rounding_shifts(graph: Graph, names: Mapping[str, str]) -> None:
    """Take what adds shifts out of the graph, once branches are folded.

    Behind a MatMul, which has no bias to add to, it is left where it is.

    Args:
        graph: The graph.
        names: Layer names by the name of the initializer with the shift.
    """
    for node in graph.nodes:
        found = _shift_and_source(node, names)
        if found is None:
            continue
        shift, source = found
        layer = layer_of(producer(source))
        if layer is not None and layer.node.op_type == "MatMul":
            node.meta[_KEY] = shift
            continue
        # Behind a branch that could not be folded nothing is merged, or rounded.
        if layer is not None and read_once(source) and _has_known_bias(layer):
            layer.node.meta[_KEY] = shift
        graph.replace(node, source)


def _has_known_bias(layer: Layer) -> bool:
    return layer.bias is None or array_of(layer.bias) is not None


def _shift_and_source(
    node: ir.Node, names: Mapping[str, str]
) -> tuple[RoundingShift, ir.Value] | None:
    """The shift that a node adds, and to what; None for any other node."""
    if node.op_type != "Add":
        return None
    for source, offset in (node.inputs, node.inputs[::-1]):
        values = array_of(offset)
        if source is None or offset is None or values is None:
            continue
        name = names.get(offset.name or "")
        if name is not None:
            return RoundingShift(name, np.float64(values).reshape(-1)), source
    return None


def drop_rounding_shifts(graph: Graph, layer: Layer) -> None:
    """Drop what still adds a shift behind a layer whose weight stays as it is."""
    for reader in layer.output.consumers():
        if rounding_shift(reader) is not None:
            graph.replace(reader, layer.output)


def rounding_shift(node: ir.Node) -> RoundingShift | None:
    """The shift that is noted at a node."""
    found: RoundingShift | None = node.meta.get(_KEY)
    return found


def scale_rounding_shift(node: ir.Node, factor: Array) -> None:
    """Follow a layer whose outputs become `factor` [m] times as large."""
    shift = rounding_shift(node)
    if shift is not None:
        node.meta[_KEY] = RoundingShift(shift.name, shift.values * factor)


def warn_of_coarse_steps(layer: Layer, lost: Array) -> None:
    """Warn where an int32 bias cannot hold the shift of its layer.

    Shifts of a few of its steps lose much of themselves and no one sees it, as long as
    that is little beside the steps that outputs are rounded to next.

    Args:
        layer: The layer.
        lost: What rounding takes from each output's bias, [m].
    """
    shift = rounding_shift(layer.node)
    if shift is None:
        return
    size, away = (float(np.linalg.norm(each)) for each in (shift.values, lost))
    seen = np.abs(lost).max() > MOST_LOST * _output_step(layer)
    if seen and away > MOST_LOST * size:
        log.warning(
            "%s: the int32 steps of its bias are too coarse for the shift that undoes "
            "the rounding of its weight to 8 bits: of %.2g they lose %.2g",
            shift.name,
            size,
            away,
        )


def _output_step(layer: Layer) -> float:
    """The smallest step that outputs are rounded to next; 0 where they are not."""
    value = layer.output
    while read_once(value):
        (reader,) = value.consumers()
        if reader.op_type == "QuantizeLinear":
            step = array_of(reader.inputs[1])
            return 0.0 if step is None else float(step.min())
        if reader.op_type not in ("Clip", "Relu"):
            break
        value = reader.outputs[0]
    return 0.0
