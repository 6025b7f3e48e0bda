"""How long a runtime takes for one image by an exported file."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np

from cora_plugin.adapters.errors import CoRaError

Runtime = Literal["onnxruntime", "openvino"]
RUNTIMES: tuple[str, ...] = get_args(Runtime)

LEAST, SECONDS = 20, 2.0
"""Runs are timed until there are so many and so much time has gone."""


def latency(runtime: str, path: Path, image: Any) -> float:
    """Median milliseconds of a run of one image, after three that are not counted.

    Args:
        runtime: One of `RUNTIMES`.
        path: An ONNX file; for OpenVINO an IR, too.
        image: The input, an array [1, …].

    Raises:
        CoRaError: The runtime does not run such files.
        ModuleNotFoundError: It is not installed.
    """
    if path.suffix not in (".onnx", *([".xml"] if runtime == "openvino" else [])):
        raise CoRaError(
            f"compare.latency: {runtime} does not run {path.name}; let the first of "
            "exports be a file that it runs"
        )
    run = _onnxruntime(path) if runtime == "onnxruntime" else _openvino(path)
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 3 + LEAST or time.perf_counter() < begin + SECONDS:
        start = time.perf_counter()
        run(np.ascontiguousarray(image))
        taken.append(time.perf_counter() - start)
    return 1e3 * median(taken[3:])


def _onnxruntime(path: Path) -> Callable[[Any], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})


def _openvino(path: Path) -> Callable[[Any], Any]:
    import openvino

    core = openvino.Core()
    how = {"PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(path), "CPU", how)
    return lambda image: compiled([image])
