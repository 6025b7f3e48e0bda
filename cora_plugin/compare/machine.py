"""What figures were measured with: versions of packages, and the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cora_plugin.integrations.toolkit import toolkits

PACKAGES = ("cora-plugin", "torch", "timm", "torchvision", "onnx", "onnxruntime")
"""Packages whose versions reports list, beside the toolkits."""


def versions() -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in (*PACKAGES, *toolkits()):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """The system, Python, processor and GPU, each in a few words."""
    cores = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    found = {
        "system": platform.platform(),
        "Python": platform.python_version(),
        "CPU": cores,
    }
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    listed = Path("/proc/cpuinfo")  # Linux; elsewhere `platform` knows the name.
    if listed.exists():
        for line in listed.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
