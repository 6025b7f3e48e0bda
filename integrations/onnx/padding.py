"""Moves zero padding that exporters write as an operator into convolutions."""

import numpy as np
import onnx_ir as ir

from cora_plugin.integrations.onnx.graph import Graph, array_of, operand


def absorb_padding(graph: Graph) -> None:
    """Move every Pad with zeros into the convolutions that read it.

    Zero is a level of every quantizer, so a Pad may change places with quantization.
    """
    for pad in graph.nodes:
        source, amounts = operand(pad, 0), _spatial_zeros(pad)
        if source is None or amounts is None:
            continue
        output = pad.outputs[0]
        convolutions = [
            layer
            for reader in output.consumers()
            for layer in ([reader] if reader.op_type == "Conv" else _behind(reader))
        ]
        if output.is_graph_output() or not all(map(_takes_padding, convolutions)):
            continue
        if not convolutions:
            continue
        for node in convolutions:
            _add_padding(node, amounts)
        output.replace_all_uses_with(source)


def is_zero_padding(node: ir.Node) -> bool:
    """Whether a node pads, and with zeros."""
    mode = node.attributes.get_string("mode", "constant")
    if node.op_type != "Pad" or mode != "constant":
        return False
    if operand(node, 2) is None:
        return True
    filling = array_of(operand(node, 2))
    return filling is not None and not filling.any()


def _behind(node: ir.Node) -> list[ir.Node]:
    """The readers of a value that is quantized by one step everywhere.

    Any reader that is no convolution keeps the Pad where it is.
    """
    if node.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
        return [node]
    scale = array_of(node.inputs[1])
    found: list[ir.Node] = []
    for reader in node.outputs[0].consumers():
        if reader.op_type != "DequantizeLinear" or scale is None or scale.size > 1:
            return [node]
        if reader.outputs[0].is_graph_output():
            return [node]
        found += reader.outputs[0].consumers()
    return found


def _takes_padding(node: ir.Node) -> bool:
    if node.op_type != "Conv":
        return False
    return node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _spatial_zeros(node: ir.Node) -> list[int] | None:
    """How many zeros a Pad puts before and after each spatial dimension."""
    amounts = array_of(operand(node, 1))
    if amounts is None or not is_zero_padding(node) or operand(node, 3) is not None:
        return None
    before, after = amounts.reshape(2, -1)
    if before[:2].any() or after[:2].any() or (amounts < 0).any():
        return None
    return [int(n) for n in np.concatenate([before[2:], after[2:]])]


def _add_padding(node: ir.Node, amounts: list[int]) -> None:
    present = node.attributes.get_ints("pads", [0] * len(amounts))
    pads = [a + b for a, b in zip(present, amounts, strict=True)]
    node.attributes.pop("auto_pad", None)
    node.attributes.add(ir.AttrInt64s("pads", pads))
