"""Writes out padding that exporters leave to the runtime to find."""

import os
from typing import Any

import onnx
from onnx import helper

AUTO = b"SAME_UPPER"
"""What torch's `padding="same"` becomes: odd amounts have their last zero behind."""


def write_out_padding(path: str | os.PathLike[str]) -> None:
    """Give dilated convolutions of a file the zeros that `auto_pad` stands for.

    onnxruntime (1.31) has no kernel that finds them where the window is dilated.
    Subgraphs are left alone.
    """
    model = onnx.load(path)
    found = [node for node in model.graph.node if _is_found_at_run_time(node)]
    for node in found:
        _write_out(node)
    if found:
        onnx.save(model, path)


def _is_found_at_run_time(node: Any) -> bool:
    given = _attributes(node)
    dilated = any(step > 1 for step in given.get("dilations", ()))
    known = node.op_type == "Conv" and "kernel_shape" in given
    return known and dilated and given.get("auto_pad") == AUTO


def _write_out(node: Any) -> None:
    given = _attributes(node)
    # Torch takes "same" at stride 1 alone, so an output has its input's size.
    sizes, dilations = given["kernel_shape"], given["dilations"]
    totals = [d * (size - 1) for size, d in zip(sizes, dilations, strict=True)]
    before = [total // 2 for total in totals]
    after = [total - half for total, half in zip(totals, before, strict=True)]
    kept = [each for each in node.attribute if each.name not in ("auto_pad", "pads")]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", before + after)])


def _attributes(node: Any) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}
