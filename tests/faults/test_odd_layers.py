"""Layers of zeros, of huge or tiny values, and images without variance: all work."""

import pytest
import torch
from interrupted_net import HOSTS, data, net
from torch import nn


def conv(change):
    made = net()
    change(made.layers[2].weight.data)
    return made


class ZeroNorm(nn.Module):
    """A residual block whose last norm begins at 0, as timm's and fairseq's do."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        nn.init.zeros_(self.norm.weight)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.norm(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


CASES = {
    "zeros": (lambda: conv(torch.Tensor.zero_), data),
    "a channel of zeros": (lambda: conv(lambda w: w[0].zero_()), data),
    "denormals": (lambda: conv(lambda w: w.mul_(1e-42)), data),
    "huge": (lambda: conv(lambda w: w.mul_(1e30)), data),
    "a norm of zeros": (lambda: ZeroNorm().eval(), data),
    "blank": (net, lambda: 3 * [torch.zeros(8, 3, 8, 8)]),
    "constant": (net, lambda: 3 * [torch.full((8, 3, 8, 8), -2.1)]),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("case", CASES)
def test_odd_layers_and_images_work(host, case):
    made, images = CASES[case]
    batches = images()
    model, apply = host(made(), batches)
    report = apply(model)
    with torch.no_grad():
        outputs = model(batches[0])
    assert torch.isfinite(getattr(outputs, "value", outputs)).all()
    assert report.layers
