"""A ConvNet with every kind of layer that carries adapters, and images for it."""

import torch
from torch import nn

from cora_plugin.objective import KL, measure


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, dilation=2, padding=2, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


def batches(count=6, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 12, 12, generator=random) for _ in range(count)]


def distance(host, images):
    with torch.no_grad():
        return measure(KL(), {"": host.float_net(images)}, host.run(images)).kl
