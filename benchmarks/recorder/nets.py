"""A small net with every kind of layer, and images for it.

A copy of what the tests use, on purpose: a record holds for years only if nothing that
a refactoring may touch takes part in it.
"""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """BN, strides, reflection, an asymmetric pad, dilation, groups, depthwise, 1×1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.reflect = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.same = nn.Conv2d(32, 32, 2, padding="same", bias=False)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=4)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 10] of images [N, 3, 16, 16]."""
        x = self.relu(self.stem_bn(self.stem(x)))
        x = self.relu(self.reflect(x) + x)
        x = self.relu(self.depthwise_bn(self.depthwise(x)))
        x = self.relu(self.pointwise(x))
        x = self.relu(self.same(x))
        x = self.relu(self.dilated(x))
        return self.head(torch.flatten(self.pool(x), 1))


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth images with some noise, [count, 3, 16, 16]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=random)
    smooth = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, 16, 16, generator=random)


def net() -> nn.Module:
    """The net, taught to tell mean colours; the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        taught = Net()
        torch.manual_seed(0)
        x = images(256, seed=1)
        y = _classes(x)
        optimizer = torch.optim.Adam(taught.parameters(), 3e-3)
        for step in range(60):
            batch = slice(step * 32 % 256, step * 32 % 256 + 32)
            optimizer.zero_grad()
            nn.functional.cross_entropy(taught(x[batch]), y[batch]).backward()
            optimizer.step()
    return taught.eval()


def _classes(x: Tensor) -> Tensor:
    """The class of each image, by its mean colour; seven of ten occur."""
    random = torch.Generator().manual_seed(0)
    return (x.mean((2, 3)) @ torch.randn(3, 10, generator=random)).argmax(1)


def labelled() -> tuple[Tensor, Tensor]:
    """Images and their classes, as a recipe's factory gives them."""
    x = images(72, seed=2)
    return x, _classes(x)


BATCHES = [(x, torch.zeros(len(x))) for x in images(64, seed=2).split(16)]
"""Calibration data as loaders yield it."""

UNSEEN = images(64, seed=3)
"""What outputs are recorded of."""
