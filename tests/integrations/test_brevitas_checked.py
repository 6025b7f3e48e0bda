"""What the check of a file says where a runtime's own kernels are not exact."""

import logging

import brevitas.nn as qnn
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import Int32Bias
from torch import nn

from cora_plugin.integrations.brevitas import export_onnx_qcdq


class Chain(nn.Module):
    """Inputs and weights that use all of their levels: sums of products clip."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(
            qnn.QuantIdentity(bit_width=8, return_quant_tensor=True),
            self.conv(3),
            qnn.QuantReLU(bit_width=8, return_quant_tensor=True),
            self.conv(16),
            qnn.QuantReLU(bit_width=8),
        )

    def conv(self, inputs):
        return qnn.QuantConv2d(
            inputs,
            16,
            3,
            padding=1,
            weight_bit_width=8,
            bias_quant=Int32Bias,
            return_quant_tensor=True,
        )

    def forward(self, x):
        return self.inner(x).mean((2, 3))


def test_kernels_that_a_runtime_fuses_are_told_from_the_file(caplog, tmp_path):
    torch.manual_seed(0)
    model = Chain()
    with torch.no_grad():
        for layer in (model.inner[1], model.inner[3]):
            layer.weight.copy_(layer.weight.sign() * layer.weight.abs().max())
        x = 4 * torch.ones(4, 3, 12, 12) * torch.randn(4, 3, 1, 1).sign()
        with calibration_mode(model):
            model(x)
        model.eval()
        largest = float(model(x).abs().max())
    with caplog.at_level(logging.INFO):
        far = export_onnx_qcdq(model, x, tmp_path / "net.onnx")
    # On x86 without VNNI it is; elsewhere the kernels are exact.
    assert (far > 0.1 * largest) == ("ORT_ENABLE_BASIC" in caplog.text)
    assert "onnxruntime differs from torch" in caplog.text
