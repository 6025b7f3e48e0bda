"""A tiny net on both hosts, quantized, and how it is given adapters."""

import pytest
import torch
from torch import nn

CONFIG = {"budget": 0.3, "held_out": 0.25, "sensitivity_images": 4}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        return self.layers(x)


def net():
    torch.manual_seed(0)
    return Net().eval()


def data():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=random) for _ in range(3)]


def brevitas(net, batches):
    pytest.importorskip("brevitas")
    from cora_plugin.integrations.brevitas import apply_cora
    from cora_plugin.integrations.brevitas.recipe import quantize_ptq

    loader = [(images, torch.zeros(8)) for images in batches]
    model = quantize_ptq(net, loader, weight_bits=3)
    return model, lambda model: apply_cora(batches, model, CONFIG)


def nncf(net, batches):
    pytest.importorskip("nncf")
    from cora_plugin.integrations.nncf import apply_cora
    from cora_plugin.integrations.nncf.recipe import quantize_ptq

    model = quantize_ptq(net, batches, weight_bits=3)
    return model, lambda model: apply_cora(model, batches, CONFIG)


HOSTS = (brevitas, nncf)
