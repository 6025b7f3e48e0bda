"""A small net as MobileNets are: channels of very different ranges, far from zero."""

import copy

import torch
from torch import nn

RANGES = 50
"""The widest channel's spread behind the first batch norm, over the narrowest's."""


class UnevenNet(nn.Module):
    """Depthwise and pointwise layers, each behind a batch norm and a clip.

    The first norm gives the depthwise layer inputs of one sign whose means are large
    beside their spreads, so that the mean of its rounding error is large beside what
    the second norm makes of its outputs.
    """

    def __init__(self, channels=32):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.wide = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.last = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 10)
        spreads = torch.logspace(0, -torch.log10(torch.tensor(RANGES)), channels)
        with torch.no_grad():
            self.wide.weight.copy_(spreads)
            self.wide.bias.fill_(3.0)

    def forward(self, x):
        """Logits of images [N, 3, H, W]."""
        x = nn.functional.relu6(self.wide(self.stem(x)))
        x = nn.functional.relu6(self.norm(self.depthwise(x)))
        x = nn.functional.relu6(self.last(self.pointwise(x)))
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def uneven_net(images):
    """The net with random weights, whose batch norms know these images."""
    torch.manual_seed(0)
    net = UnevenNet().train()
    for norm in (net.wide, net.norm, net.last):
        norm.momentum = None
    for _ in range(2):
        net(images)
    return net.eval()


def without_rounding_shifts(model):
    """A copy of a model whose adapters know of no rounding shift."""
    model = copy.deepcopy(model)
    shifts = [
        e for e in model.modules() if getattr(e, "rounding_shift", None) is not None
    ]
    assert shifts
    for branch in shifts:
        branch.rounding_shift = None
    return model
