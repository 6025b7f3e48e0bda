"""Lets convolutions do the zero padding that exporters write as an operator."""

import numpy as np
import onnx
from onnx import helper

from cora_plugin.integrations.onnx.graph import Graph, attributes


def absorb_padding(graph: Graph) -> None:
    """Move every Pad with zeros into the convolutions that read it.

    Zero is a level of every quantizer, so a Pad may change places with quantization.
    """
    for pad in [node for node in graph.nodes if node.op_type == "Pad"]:
        amounts = _spatial_zeros(graph, pad)
        if amounts is None:
            continue
        output = pad.output[0]
        readers = graph.readers(output)
        convolutions = [
            layer
            for reader in readers
            for layer in (
                [reader] if reader.op_type == "Conv" else _behind(graph, reader)
            )
        ]
        if output in graph.outputs or not all(map(_takes_padding, convolutions)):
            continue
        if not convolutions:
            continue
        for node in convolutions:
            _add_padding(node, amounts)
        graph.redirect(output, pad.input[0], readers)


def is_zero_padding(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node pads, and with zeros."""
    if node.op_type != "Pad" or attributes(node).get("mode", b"constant") != (
        b"constant"
    ):
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    filling = graph.value(node.input[2])
    return filling is not None and not filling.any()


def _behind(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The readers of a value that is quantized by one step everywhere.

    Any reader that is no convolution keeps the Pad where it is.
    """
    if node.op_type != "QuantizeLinear" or node.output[0] in graph.outputs:
        return [node]
    scale = graph.value(node.input[1])
    found = []
    for reader in graph.readers(node.output[0]):
        if reader.op_type != "DequantizeLinear" or scale is None or scale.size > 1:
            return [node]
        if reader.output[0] in graph.outputs:
            return [node]
        found += graph.readers(reader.output[0])
    return found


def _takes_padding(node: onnx.NodeProto) -> bool:
    if node.op_type != "Conv":
        return False
    return attributes(node).get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")


def _spatial_zeros(graph: Graph, pad: onnx.NodeProto) -> list[int] | None:
    """How many zeros a Pad puts before and after each spatial dimension."""
    amounts = graph.value(pad.input[1])
    if amounts is None or not is_zero_padding(graph, pad):
        return None
    if len(pad.input) > 3 and pad.input[3]:
        return None
    before, after = amounts.reshape(2, -1)
    if before[:2].any() or after[:2].any() or (amounts < 0).any():
        return None
    return [int(n) for n in np.concatenate([before[2:], after[2:]])]


def _add_padding(node: onnx.NodeProto, amounts: list[int]) -> None:
    present = attributes(node).get("pads", [0] * len(amounts))
    kept = [a for a in node.attribute if a.name not in ("pads", "auto_pad")]
    pads = [a + b for a, b in zip(present, amounts, strict=True)]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", pads)])
