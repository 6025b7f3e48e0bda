"""A net whose weights are rounded to steps of a tenth, without a toolkit."""

import torch
from torch import nn
from torch.nn import functional

from cora_plugin.integrations.training import latent

STEP = 0.1


class Rounded(nn.Linear):
    """A linear layer with weights of -8 to 7 steps; gradients pass straight through."""

    def positions(self):
        return (self.weight / STEP).clamp(-8, 7)

    def forward(self, x):
        rounded = self.positions().round() * STEP
        weight = self.weight + (rounded - self.weight).detach()
        return functional.linear(x, weight, self.bias)


def latents(net):
    return [
        latent(name, layer.weight, layer.positions, -8, 7)
        for name, layer in net.named_modules()
        if isinstance(layer, Rounded)
    ]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Rounded(8, 16), nn.ReLU(), Rounded(16, 4))


def groups(model, **rest):
    """The weights, and the biases with options of their own."""
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    others = [p for n, p in model.named_parameters() if n.endswith("bias")]
    return [{"params": weights}, {"params": others, **rest}]


def batches(count, seed=1):
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(32, 8, generator=random)
        yield x, (x[:, :4] > 0).long().argmax(1)
