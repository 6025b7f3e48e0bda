"""Exported files: their bytes, what they hold but for names and order, their answers.

Bytes tell whether anything changed at all. Operators by kind, the contents of constants
and the answers of a runtime tell whether what changed is of substance.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import numpy_helper
from torch import Tensor

from recorder.values import of_arrays, of_file, of_outputs

DECIMALS = 6


def of_onnx(path: Path, images: Tensor) -> dict[str, Any]:
    """An ONNX file of standard operators, run by onnxruntime and by OpenVINO."""
    return {
        "file": of_file(path),
        "graph": _graph(path),
        "onnxruntime": of_outputs(_onnxruntime(path, images), DECIMALS),
        "openvino": of_outputs(_openvino(path, images), DECIMALS),
    }


def of_qonnx(path: Path, images: Tensor) -> dict[str, Any]:
    """A QONNX file, run by the package of that name."""
    return {
        "file": of_file(path),
        "graph": _graph(path),
        "qonnx": of_outputs(_qonnx(path, images), DECIMALS),
    }


def of_ir(path: Path, images: Tensor) -> dict[str, Any]:
    """An OpenVINO IR, .xml and .bin, run by OpenVINO."""
    operators: Counter[str] = Counter()
    constants = []
    for node in openvino.Core().read_model(path).get_ops():
        operators[node.get_type_name()] += 1
        if node.get_type_name() == "Constant":
            constants.append(_constant(node))
    return {
        "file": {s: of_file(path.with_suffix(s)) for s in (".xml", ".bin")},
        "graph": {"operators": _sorted(operators), "constants": of_arrays(constants)},
        "openvino": of_outputs(_openvino(path, images), DECIMALS),
    }


def of_torchscript(path: Path, images: Tensor) -> dict[str, Any]:
    """A TorchScript file, run by torch."""
    module = torch.jit.load(path)
    with torch.no_grad():
        outputs = module(images).numpy()
    operators = Counter(node.kind() for node in module.inlined_graph.nodes())
    tensors = [t.detach().numpy() for t in module.state_dict().values()]
    return {
        "file": of_file(path),
        "graph": {"operators": _sorted(operators), "constants": of_arrays(tensors)},
        "torch": of_outputs(outputs, DECIMALS),
    }


def of_program(program: torch.export.ExportedProgram, images: Tensor) -> dict[str, Any]:
    """What `torch.export` made, run by torch."""
    nodes = program.graph.nodes
    operators = Counter(str(n.target) for n in nodes if n.op == "call_function")
    held = [*program.state_dict.values(), *program.constants.values()]
    tensors = [t.detach().numpy() for t in held if isinstance(t, Tensor)]
    with torch.no_grad():
        outputs = program.module()(images).numpy()
    return {
        "graph": {"operators": _sorted(operators), "constants": of_arrays(tensors)},
        "torch": of_outputs(outputs, DECIMALS),
    }


def of_any(path: Path, images: Tensor) -> dict[str, Any]:
    """A file that a recipe named, by its name."""
    if "qonnx" in path.name:
        return of_qonnx(path, images)
    kinds = {".onnx": of_onnx, ".xml": of_ir, ".pt": of_torchscript}
    return kinds[path.suffix](path, images)


def _graph(path: Path) -> dict[str, Any]:
    operators: Counter[str] = Counter()
    constants = []
    graph = onnx.load(path).graph
    for node in _nodes(graph):
        operators[node.op_type] += 1
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                constants.append(numpy_helper.to_array(attribute.t))
    constants += [numpy_helper.to_array(t) for t in graph.initializer]
    return {"operators": _sorted(operators), "constants": of_arrays(constants)}


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes, those of the branches of an If included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _constant(node: Any) -> np.ndarray:
    """The bytes of an IR's constant, which numpy has no type for below 8 bits."""
    values: np.ndarray = node.get_data() if node.get_byte_size() else np.zeros(0)
    kind = node.get_element_type().get_type_name()
    if kind in ("i4", "u4", "bf16", "f16"):
        return node.get_data(dtype=np.float32)
    return values


def _sorted(counts: "Counter[str]") -> dict[str, int]:
    return dict(sorted(counts.items()))


def _onnxruntime(path: Path, images: Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    (answer,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return answer


def _openvino(path: Path, images: Tensor) -> np.ndarray:
    # Left to itself it computes in bfloat16 where the processor has that.
    settings = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return compiled(images.numpy())[0].copy()


def _qonnx(path: Path, images: Tensor) -> np.ndarray:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    newest = onnx.IR_VERSION
    # The executor makes models as new as the onnx package, which onnxruntime lags.
    onnx.IR_VERSION = 10
    try:
        model = cleanup_model(ModelWrapper(str(path)))
        (name,) = [each.name for each in model.graph.input]
        (answer,) = execute_onnx(model, {name: images.numpy()}).values()
    finally:
        onnx.IR_VERSION = newest
    return answer
