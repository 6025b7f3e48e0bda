"""MobileNetV2 for Fashion-MNIST: the network of mobilenet_fashion.pt."""

import torch
from torch import nn
from torchvision.models import MobileNetV2

STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]
"""Expansion, channels before the width, blocks and stride, as at 224 pixels but for two
strides that 28 pixels do not allow."""

SPREAD = 1.0
"""Standard deviation of the logarithm of the scales that batch norms start with.

In networks that were trained for hundreds of epochs the channels of one layer differ in
range by tens of times; a few epochs do not get there from scales of one."""


class FashionMobileNetV2(MobileNetV2):
    """[N, 1, 28, 28] -> [N, 10] logits; width 0.5, 0.69 M parameters."""

    def __init__(self) -> None:
        super().__init__(
            num_classes=10, width_mult=0.5, inverted_residual_setting=STAGES
        )
        stem = self.features[0][0]  # type: ignore[index]
        self.features[0][0] = nn.Conv2d(  # type: ignore[index]
            1, stem.out_channels, 3, 1, 1, bias=False
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                scales = torch.randn_like(module.weight.data) * SPREAD
                module.weight.data = scales.exp().clamp(0.1, 5.0)
