"""Rewrites an exported file."""

import os
from collections.abc import Callable

import onnx

from cora_plugin.integrations.onnx.graph import Graph


def rewrite(path: str | os.PathLike[str], *steps: Callable[[Graph], None]) -> None:
    """Carry out steps, such as `pack_weights`, on a file of opset `TRACED_OPSET`."""
    graph = Graph(onnx.load(path))
    for step in steps:
        step(graph)
    onnx.save(graph.finish(), path)
