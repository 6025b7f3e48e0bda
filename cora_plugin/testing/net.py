"""A small net with every kind of layer that carries adapters, and images for it."""

import torch
from torch import Tensor, nn

LAYERS = ("stem", "reflect", "depthwise", "pointwise", "same", "dilated", "head")
"""The layers of `Net` in their order."""


def images(count: int, seed: int = 0) -> Tensor:
    """Images with structure: smooth, with some noise, [count, 3, 16, 16]."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=random)
    smooth = nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, 16, 16, generator=random)


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
        """[N, 3, 16, 16] to logits [N, 10]."""
        x = self.relu(self.stem_bn(self.stem(x)))
        x = self.relu(self.reflect(x) + x)
        x = self.relu(self.depthwise_bn(self.depthwise(x)))
        x = self.relu(self.pointwise(x))
        x = self.relu(self.same(x))
        x = self.relu(self.dilated(x))
        logits: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return logits


def trained(net: nn.Module) -> nn.Module:
    """Teach a net to tell mean colours, so that its outputs mean something."""
    torch.manual_seed(0)
    net.train()
    x = images(256, seed=1)
    y = x.mean((2, 3)) @ torch.randn(3, 10)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        batch = slice(step * 32 % 256, step * 32 % 256 + 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch].argmax(1)).backward()
        optimizer.step()
    return net.eval()
