"""Dilated windows with padding="same", through both hosts and their ONNX files."""

from importlib.util import find_spec

import onnx
import pytest
import torch
from any_net import adapt, export, quantized
from torch import nn

HOSTS = [host for host in ("brevitas", "nncf") if find_spec(host)]


class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 12, 3, padding="same", dilation=2)
        # An odd number of zeros in all: the last is behind.
        self.two = nn.Conv2d(12, 12, (2, 4), padding="same", dilation=(3, 2), groups=3)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        y = self.two(self.one(x).relu()).relu()
        return 9 * self.head((y * y.shape[2] / 16).mean((2, 3)))


@pytest.mark.parametrize("host", HOSTS)
def test_files_have_the_zeros_that_a_dilated_window_needs(host, tmp_path):
    torch.manual_seed(1)
    data = [torch.randn(4, 3, 16, 14) for _ in range(4)]
    model = quantized(host, Dilated(), data)
    adapt(host, model, data)
    for options in ({}, {"int8_kernels": True}):
        off = export(host, model, data[0], tmp_path / "net.onnx", **options)
        # int8 kernels clip on some processors: see docs/exports.md.
        assert off < 0.01 or options
    if host == "brevitas":
        from cora_plugin.integrations.brevitas import export_qonnx

        export_qonnx(model, data[0], tmp_path / "net.qonnx")
        nodes = onnx.load(tmp_path / "net.qonnx").graph.node
        windows = [node for node in nodes if node.op_type == "Conv"]
        assert windows
        for node in windows:
            names = {each.name for each in node.attribute}
            assert "auto_pad" not in names or "dilations" not in names
