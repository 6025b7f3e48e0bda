"""Exported files in their runtimes."""

from collections import Counter
from pathlib import Path

import onnxruntime
import openvino
import pytest

from cora_plugin.integrations.checked import runs_all

CPU = Path("/proc/cpuinfo")

SATURATES = CPU.exists() and "avx2" in CPU.read_text() and "vnni" not in CPU.read_text()
"""Whether int8 kernels add pairs of products in 16 bits, which clips large ones.

x86 processors without VNNI do. What a file computes is then tested without them.
"""


packed_files_run = pytest.mark.skipif(
    not runs_all(), reason="onnxruntime is too old for files with packed weights"
)


def openvino_output(path, x, mode="ACCURACY"):
    settings = {"EXECUTION_MODE_HINT": mode}
    if SATURATES:
        settings["LP_TRANSFORMS_MODE"] = "NO"
    return openvino.Core().compile_model(path, "CPU", settings)(x.numpy())[0]


def onnx_session(model, options=None):
    """A session of a file or of its bytes."""
    if options is None:
        options = onnxruntime.SessionOptions()
        if SATURATES:
            level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.graph_optimization_level = level
    return onnxruntime.InferenceSession(
        model, options, providers=["CPUExecutionProvider"]
    )


def onnx_output(path, x):
    session = onnx_session(path)
    (name,) = [each.name for each in session.get_inputs()]
    return session.run(None, {name: x.numpy()})[0]


def operators(model):
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph.node)
