"""Bias corrections restore means, and leave a network that is merely quieter alone."""

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, distance, net

from cora_plugin import CoRa
from cora_plugin.adapters import Factors
from cora_plugin.adapters.factor import Weighting
from cora_plugin.adapters.operation import patches
from cora_plugin.fitting import Walk, cascaded_shifts, own_shifts
from cora_plugin.fitting.bias import OutputMatch
from cora_plugin.fitting.walk import Pair


@pytest.mark.parametrize("index", range(5))
def test_the_own_correction_restores_the_mean_of_a_layer(index):
    host = PlainHost(net(), bits=2)
    layer = host.layers[index]
    shape = (8, 10, 10)
    channels = layer.weight.shape[1] * layer.operation.groups
    x = torch.randn(shape[0], channels, *shape[1:]) + 1
    if not layer.operation.dimensions:
        x = torch.randn(8, channels) + 1
    columns = patches(x, layer.operation, layer.kernel).double()
    factors = Factors.of(layer.residual, layer.operation, Weighting())
    adapters = {layer.name: factors.adapter(1)}
    (shift,) = own_shifts([layer], adapters, {layer.name: columns.mean(1)}).values()
    weight = layer.dequantized + adapters[layer.name].merged()
    over = (0, *range(2, x.ndim))
    wanted = layer.operation(x, layer.weight).mean(over)
    torch.testing.assert_close(layer.operation(x, weight).mean(over) + shift, wanted)


def match(layer, y, other):
    found = OutputMatch(layer)
    for part, answer in zip(y.split(4), other.split(4), strict=True):
        found.update(Pair(part, part, part, answer))
    return found.shift()


def test_a_shift_is_taken_back_and_a_gain_is_left_alone():
    layer = PlainHost(net()).layers[2]
    y = torch.randn(8, 32, 5, 5) + torch.randn(32, 1, 1)
    shifted = torch.randn(32)
    torch.testing.assert_close(
        match(layer, y, y + shifted.view(-1, 1, 1)), -shifted, atol=1e-5, rtol=1e-4
    )
    quieter = match(layer, y, 0.4 * y)
    torch.testing.assert_close(quieter, torch.zeros(32), atol=1e-5, rtol=0)
    # A signal that is gone has no mean either; one that is louder is brought down.
    noise = torch.randn(8, 32, 5, 5)
    assert match(layer, y, noise).abs().max() < 0.5
    louder = match(layer, y, 2 * y)
    torch.testing.assert_close(louder, -y.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)


def test_a_network_that_is_merely_quieter_stays_as_it_is():
    host, data = PlainHost(net()), batches(2)
    for layer in host.model:
        if hasattr(layer, "bias"):
            layer.bias.data.zero_()
    for layer in host.float_net:
        if hasattr(layer, "bias"):
            layer.bias.data.zero_()
    quiet = {layer.name: 0.7 * layer.weight for layer in host.layers}
    shifts = cascaded_shifts(Walk(host, host.layers, data), quiet)
    assert len(shifts) == 5
    with torch.no_grad():
        plain = host.float_net(data[0])
        with host.weights(quiet, shifts):
            torch.testing.assert_close(
                host.run(data[0]), 0.7**5 * plain, atol=1e-6, rtol=1e-3
            )


@pytest.mark.parametrize("kind", ["own", "cascade"])
def test_it_is_a_step_of_its_own_that_helps_or_is_taken_back(kind):
    test = batches(1, seed=9)[0]
    host = PlainHost(net(), bits=2)
    config = {"budget": 0.02, "search": "uniform", "bias_correction": kind}
    report = CoRa(config).apply(host, batches())
    adapters, correction = report.steps
    assert correction.name == "bias correction"
    assert correction.kept == (correction.after.kl < adapters.after.kl)
    assert bool(host.shifts) == correction.kept
    without = PlainHost(net(), bits=2)
    CoRa({**config, "bias_correction": "off"}).apply(without, batches())
    assert not without.shifts
    if correction.kept:
        assert distance(host, test) < distance(without, test)
