"""The demo: a real ConvNet, quantized until it breaks, repaired, exported, run."""

from cora_plugin.demo.run import run_demo

__all__ = ["run_demo"]
