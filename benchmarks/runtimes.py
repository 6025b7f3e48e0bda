"""The runtimes that exported files are loaded into, in the same words for each.

With `as_written` a runtime computes what the file says, node by node in float32, in
place of its int8 kernels. Those of CPUs without VNNI saturate sums of 16 bits, so that
their answers say little about a file.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from torch import Tensor

INTEGER_LAYERS = {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger"}
FLOAT_LAYERS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "MatMulNBits"}


class Session(Protocol):
    """A file that is loaded for inputs of one batch size."""

    def run(self, images: Any) -> Any:
        """Outputs of one batch, numpy arrays."""

    def layers(self) -> tuple[int, int]:
        """How many convolutions and matrix products are int8 kernels, of how many.

        Counted in the graph that the runtime made of the file.
        """


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    def __init__(
        self, path: Path, images: Tensor, threads: int, as_written: bool = False
    ) -> None:
        options = onnxruntime.SessionOptions()
        if as_written:
            level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.graph_optimization_level = level
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            graph = onnx.load(options.optimized_model_filepath).graph
        self.operators = [node.op_type for node in graph.node]
        self.input = self.session.get_inputs()[0].name

    def run(self, images: Any) -> Any:
        """Outputs of one batch."""
        return self.session.run(None, {self.input: images})[0]

    def layers(self) -> tuple[int, int]:
        """Of the optimized graph, which is what runs."""
        integer = sum(kind in INTEGER_LAYERS for kind in self.operators)
        return integer, integer + sum(kind in FLOAT_LAYERS for kind in self.operators)


class OpenVino:
    """OpenVINO on the CPU, in the precision that it chooses itself."""

    def __init__(
        self, path: Path, images: Tensor, threads: int, as_written: bool = False
    ) -> None:
        core = openvino.Core()
        model = core.read_model(path)
        model.reshape(list(images.shape))
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if as_written:
            settings["LP_TRANSFORMS_MODE"] = "NO"
        self.compiled = core.compile_model(model, "CPU", settings)
        self.request = self.compiled.create_infer_request()

    def run(self, images: Any) -> Any:
        """Outputs of one batch."""
        return self.request.infer([images], share_inputs=True)[0].copy()

    def layers(self) -> tuple[int, int]:
        """Of the runtime model, which says what kernel each layer has."""
        kernels = []
        for node in self.compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if info["layerType"].astype(str) in (
                "Convolution",
                "FullyConnected",
                "MatMul",
            ):
                kernels.append(info["primitiveType"].astype(str).lower())
        return sum(kernel.endswith("i8") for kernel in kernels), len(kernels)


RUNTIMES: dict[str, Callable[..., Session]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}


def outputs(
    runtime: str,
    path: Path,
    images: Tensor,
    batch_size: int,
    threads: int,
    as_written: bool = False,
) -> Tensor:
    """Outputs of a file for images of any number, [N, classes]."""
    session = RUNTIMES[runtime](path, images[:batch_size], threads, as_written)
    found = []
    for batch in images.split(batch_size):
        filled = torch.cat([batch, images[: batch_size - len(batch)]])
        found.append(session.run(filled.numpy())[: len(batch)])
    return torch.from_numpy(np.concatenate(found))
