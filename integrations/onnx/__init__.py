"""What both hosts' ONNX exports share: packed 4-bit weights and int8 kernels."""
