"""Bias corrections restore means, and leave a network that is merely quieter alone."""

from dataclasses import replace

import pytest
import torch
from plain_host import PlainHost, read_correction
from small_net import batches, distance, net

from cora_plugin import CoRa
from cora_plugin.adapters import Adapter, Factors, Form
from cora_plugin.adapters.factor import Weighting
from cora_plugin.adapters.operation import patches
from cora_plugin.fitting import Walk, cascaded_shifts, own_shifts, rounding_shift
from cora_plugin.fitting.bias import OutputMatch
from cora_plugin.outputs import only


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


@pytest.mark.parametrize("index", range(5))
def test_the_rounding_shift_restores_the_mean_of_a_merged_layer(index):
    host = PlainHost(net(), bits=2)
    layer = host.layers[index]
    adapter = Factors.of(layer.residual, layer.operation, Weighting()).adapter(1)
    groups, columns = layer.operation.groups, layer.columns
    mean = torch.rand(groups, columns, dtype=torch.float64)
    found = rounding_shift(layer, adapter, mean)
    merged = (layer.dequantized + adapter.merged()).double().flatten(1)
    outputs = len(merged)
    for m in range(outputs):
        scale, lost = merged[m].abs().max() / 127, 0.0
        for k in range(columns):
            rounded = scale * round(float(merged[m, k] / scale))
            u = mean[m // (outputs // groups), k]
            lost += float((merged[m, k] - rounded) * u)
        assert float(found[m]) == pytest.approx(lost, rel=1e-3, abs=1e-6)
    assert found.any() and found.shape == (outputs,)


def test_the_rounding_shift_grows_with_its_channel():
    """So it stays right where exports merge scales of channels into weights."""
    layer = PlainHost(net(), bits=2).layers[1]
    shape, groups = tuple(layer.weight.shape), layer.operation.groups
    forms = [Form.whole(32, shape, groups)]
    plus, mean = torch.randn(shape), torch.rand(groups, layer.columns).double()
    scale = 2.0 ** torch.arange(-8, len(plus) - 8).view(-1, 1, 1, 1)
    other = replace(layer, dequantized=scale * layer.dequantized)
    found = rounding_shift(layer, Adapter.of(forms, {"a": plus}), mean)
    scaled = rounding_shift(other, Adapter.of(forms, {"a": scale * plus}), mean)
    assert torch.equal(scaled, scale.flatten() * found)


@pytest.mark.parametrize("config", [{}, {"regression": False}, {"alternations": 1}])
def test_adapters_that_stand_know_their_rounding_shift(config):
    host = PlainHost(net(), bits=2)
    plain = host.model.state_dict()
    CoRa({"budget": 0.3, **config}).apply(host, batches())
    adapters = read_correction(host.model).adapters
    assert adapters
    for name, adapter in adapters.items():
        assert adapter.rounding_shift.shape == adapter.weight_shape[:1]
        assert adapter.rounding_shift.any(), name
        assert adapter.scaled(0.5).rounding_shift is None
    assert host.model.state_dict().keys() == plain.keys()


def match(layer, u, v, gain=1.0, plus=0.0):
    """The shift of a layer whose weights are float ones times a gain."""
    found = OutputMatch(layer, gain * layer.weight)
    weight = layer.operation.matrices(layer.weight.double()).mT
    for x, other in zip(u.split(40, 1), v.split(40, 1), strict=True):
        found.update(0, x, other)
    mean, answer = ((x @ weight).mean(1).flatten() for x in (u, v))
    return found.shift(mean, gain * answer + plus), mean


def test_a_shift_is_taken_back_and_a_gain_is_left_alone():
    layer = PlainHost(net()).layers[2]
    groups, columns = layer.operation.groups, layer.columns
    u = torch.randn(groups, 200, columns).double() + torch.randn(columns)
    shifted = torch.randn(32)
    shift, _ = match(layer, u, u, plus=shifted)
    torch.testing.assert_close(shift, -shifted, atol=1e-5, rtol=1e-4)
    quieter, _ = match(layer, u, u, gain=0.4)
    torch.testing.assert_close(quieter, torch.zeros(32), atol=1e-5, rtol=0)
    # A signal that is gone has no mean either; one that is louder is brought down.
    gone, _ = match(layer, u, torch.randn(groups, 200, columns).double())
    assert gone.abs().max() < 0.5
    louder, mean = match(layer, u, u, gain=2.0)
    torch.testing.assert_close(louder.double(), -mean, atol=1e-5, rtol=1e-4)


def test_a_network_that_is_merely_quieter_stays_as_it_is():
    host, data = PlainHost(net()), batches(2)
    for layer in host.model:
        if hasattr(layer, "bias"):
            layer.bias.data.zero_()
    for layer in host.float_net:
        if hasattr(layer, "bias"):
            layer.bias.data.zero_()
    quiet = {layer.name: 0.7 * layer.weight for layer in host.layers}
    shifts = cascaded_shifts(Walk(host, host.layers, torch.cat(data), 0), quiet)
    assert len(shifts) == 5
    with torch.no_grad():
        plain = host.float_net(data[0])
        with host.acting(quiet, shifts):
            torch.testing.assert_close(
                only(host.run(data[0])), 0.7**5 * plain, atol=1e-6, rtol=1e-3
            )


@pytest.mark.parametrize("kind", ["own", "cascade"])
def test_it_is_a_step_of_its_own_that_helps_or_is_taken_back(kind):
    test = batches(1, seed=9)[0]
    host = PlainHost(net(), bits=2)
    plain = {"budget": 0.02, "search": "uniform", "metric": "qera-exact"}
    config = {**plain, "bias_correction": kind}
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
