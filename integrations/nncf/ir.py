"""Rewrites converted OpenVINO models that its CPU plugin cannot compile."""

import openvino
from openvino import opset13

PRODUCTS = "MatMul", "Einsum"
"""Operators that multiply the factors of adapters."""


def divide_factors(model: openvino.Model) -> None:
    """Write the scales in products of constants (shared bases) as divisions.

    Integers times a scale are a weight that OpenVINO (2026.4) keeps for a kernel, even
    where the other factor is constant, too; in bfloat16, which it chooses itself where
    the processor has it, that kernel's compiler divides by zero and ends the process.
    A division it computes when it loads the file.
    """
    constants: set[str] = set()
    for node in model.get_ordered_ops():
        sources = {value.get_node().get_name() for value in node.input_values()}
        if node.get_type_name() == "Parameter" or not sources <= constants:
            continue
        constants.add(node.get_name())
        for port in node.inputs() if node.get_type_name() in PRODUCTS else ():
            scaled = port.get_source_output().get_node()
            if scaled.get_type_name() == "Multiply":
                integers, scale = scaled.input_values()
                one = opset13.constant(1.0, scale.get_element_type())
                levels = opset13.divide(one, scale)
                port.replace_source_output(opset13.divide(integers, levels).output(0))
