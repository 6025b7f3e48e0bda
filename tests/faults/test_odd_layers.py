"""Layers of zeros, of huge or tiny values, and images without variance: all work."""

import pytest
import torch
from interrupted_net import HOSTS, data, net


def conv(change):
    made = net()
    change(made.layers[2].weight.data)
    return made


CASES = {
    "zeros": (lambda: conv(torch.Tensor.zero_), data),
    "a channel of zeros": (lambda: conv(lambda w: w[0].zero_()), data),
    "denormals": (lambda: conv(lambda w: w.mul_(1e-42)), data),
    "huge": (lambda: conv(lambda w: w.mul_(1e30)), data),
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
