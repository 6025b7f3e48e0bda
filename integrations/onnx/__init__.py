"""What both hosts' ONNX exports share: packed 4-bit weights and int8 kernels."""

TRACED_OPSET = 20
"""The last that torch's tracing exporter writes; from it to 21 operators only widen."""
