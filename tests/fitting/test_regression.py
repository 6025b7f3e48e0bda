"""The regression is the least-squares solution of the whole output error."""

import itertools

import pytest
import torch
from options import forms
from plain_host import PlainHost
from small_net import batches, distance, net
from torch import nn

from cora_plugin import CoRa, CoRaConfig
from cora_plugin.adapters.factor import metric_root
from cora_plugin.fitting import LAST, Regression, Walk, regression
from cora_plugin.fitting.regression import RIDGES, CrossMoments, downhill
from cora_plugin.layer import Correction
from cora_plugin.outputs import only

CONFIG = CoRaConfig(adapter_bits=32, positions=0, damping=0)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 6))


@pytest.mark.parametrize("lowest", range(5))
def test_the_lowest_of_a_valley_is_found(lowest):
    heights = [abs(index - lowest) for index in range(5)]
    assert downhill(range(5), heights.__getitem__) == lowest


@pytest.mark.parametrize("noise", [0.03, 0.3, 3.0])
def test_ridges_of_large_layers_are_compared_in_float32(noise, monkeypatch):
    layer = PlainHost(nn.Linear(40, 6)).layers[0]
    torch.manual_seed(0)
    mixed = torch.randn(40, 40).double() * torch.logspace(0, -4, 40)
    halves = [CrossMoments(layer, 40) for _ in range(2)]
    for half in halves:
        v = torch.randn(1, 300, 40).double() @ mixed
        half.update(1.02 * v + noise * torch.randn_like(v), v)
    found = []
    for large in (10, 1000):
        monkeypatch.setattr(regression, "LARGE", large)
        found.append(regression._best_ridge(layer, *halves))
    assert found[0] == found[1] in RIDGES


@pytest.mark.parametrize("blocks", [1, 3])
def test_moments_are_those_of_both_networks(blocks):
    layer = PlainHost(nn.Conv2d(6, 8, 3, padding=1, groups=2)).layers[0]
    u, v = torch.randn(2, 9, 6, 7, 7).double()

    def columns(x):
        unfolded = nn.functional.unfold(x, 3, padding=1)  # [N, 54, 49]
        return unfolded.transpose(1, 2).reshape(-1, 2, 27).transpose(0, 1)

    cu, cv = columns(u), columns(v)
    moments = CrossMoments(layer, 27 // blocks)
    for parts in zip(cu.split(200, 1), cv.split(200, 1), strict=True):
        moments.update(*parts)
    mean_u, mean_v = moments.means
    torch.testing.assert_close(mean_u, cu.mean(1))
    torch.testing.assert_close(mean_v, cv.mean(1))
    cu, cv = cu - cu.mean(1, keepdim=True), cv - cv.mean(1, keepdim=True)
    second, cross = moments.covariances
    for block, part in enumerate(torch.arange(27).split(27 // blocks)):
        right = cv[..., part]
        expected = right.mT @ right / right.shape[1]
        torch.testing.assert_close(second[:, block], expected)
        expected = (cu - cv)[..., part].mT @ right / right.shape[1]
        torch.testing.assert_close(cross[:, block], expected)


def test_full_rank_is_the_ridge_regression_of_the_whole_error():
    host, data = PlainHost(two_layers(), bits=3), torch.randn(4000, 8)
    name, ranks = "2", {"2": 6}
    adapters, shifts = Regression(
        Walk(host, host.layers, data, 0), forms(host, ranks), {}, CONFIG
    )()
    assert set(adapters) == {name}
    layer = host.layers[1]
    with torch.no_grad():
        u = host.float_net[:2](data).double()
        y = host.float_net(data).double()
        with host.acting({}, {"0": shifts["0"]}):
            v = host.model[:2](data).double()
            answer = only(host.run(data)).double()
    u, v = u - u.mean(0), v - v.mean(0)
    error = u @ layer.weight.double().T - v @ layer.dequantized.double().T
    # The ridge holds what v tells of the upstream error, not the residual.
    upstream = (u - v) @ layer.weight.double().T
    covariance = v.T @ v / len(v)
    ridge = 7 / len(v) * covariance.diagonal().mean() * torch.eye(7)
    found = torch.linalg.solve(covariance + ridge, v.T @ upstream / len(v)).T
    expected = layer.residual + found
    torch.testing.assert_close(
        adapters[name].merged().double(), expected, atol=1e-6, rtol=1e-4
    )
    left = error - v @ expected.T
    assert left.square().sum() < 0.9 * error.square().sum()
    # The intercept gives the mean of the float outputs, but for their lost gain.
    corrected = answer + v @ adapters[name].merged().double().T
    mean = (answer.mean(0) + shifts[name]) + (
        host_mean(host, data, shifts) @ adapters[name].merged().double().T
    )
    centred = y - y.mean(0)
    gain = (centred * (corrected - corrected.mean(0))).sum() / centred.square().sum()
    torch.testing.assert_close(mean, gain * y.mean(0), atol=1e-4, rtol=1e-3)


def host_mean(host, data, shifts):
    with torch.no_grad(), host.acting({}, {"0": shifts["0"]}):
        return host.model[:2](data).double().mean(0)


def test_without_an_upstream_error_it_is_the_residual():
    host, data = PlainHost(nn.Sequential(nn.Linear(8, 7)), bits=3), torch.randn(99, 8)
    adapters, shifts = Regression(
        Walk(host, host.layers, data, 0), forms(host, {"0": 7}), {}, CONFIG
    )()
    left = adapters["0"].merged() - host.layers[0].residual.float()
    assert left.abs().max() < 1e-6
    assert shifts["0"].abs().max() < 1e-5


@pytest.mark.parametrize("search", ["uniform", "spectral"])
def test_it_helps_where_activations_are_coarse(search):
    torch.manual_seed(0)
    sizes = (8, 32, 32, 32, 32, 6)
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    for layer in layers:
        layer.weight.data *= 2
    pairs = [part for layer in layers for part in (layer, nn.ReLU())]
    deep = nn.Sequential(*pairs[:-1])
    data, test = [*torch.randn(40, 16, 8)], torch.randn(500, 8)

    def applied(regression):
        host = PlainHost(deep, act_step=3.0)
        config = {"budget": 0.3, "search": search, "regression": regression}
        return host, CoRa(config).apply(host, data)

    host, report = applied(True)
    assert {step.name: step.kept for step in report.steps}["regression"]
    assert host.shifts
    assert distance(host, test) < 0.7 * distance(applied(False)[0], test)
    again, _ = applied(True)
    assert distance(host, test) == distance(again, test)


def test_it_is_taken_back_where_the_closed_form_is_better():
    # Ranks that restore every weight, and activations without an error.
    host = PlainHost(net())
    report = CoRa({"budget": 0.6, "search": "uniform"}).apply(host, batches())
    steps = {step.name: step for step in report.steps}
    assert not steps["regression"].kept
    assert steps["adapters"].kept and report.after.kl <= steps["adapters"].after.kl
    assert not any(name.startswith("whole means") for name in steps)


def test_inputs_that_never_change_have_no_variance():
    values = torch.linspace(0.1, 7.3, 300, dtype=torch.float64)
    layer = PlainHost(nn.Linear(300, 2)).layers[0]
    moments = CrossMoments(layer, 300)
    for rows in (1, 3, 5):
        v = values.expand(1, rows, 300)
        moments.update(v, v)
    second, _ = moments.covariances
    # Rounding leaves some variances below zero: no metric has that.
    power = moments._sums[0, 0, 0].diagonal() / moments.rows
    assert (power < moments.means[1][0].square()).any()
    variances = second.diagonal(dim1=-2, dim2=-1)
    assert (variances >= 0).all() and variances.max() < 1e-12
    metric_root(second, 1e-4, "layer")


def test_means_of_the_last_layers_at_their_full_size():
    torch.manual_seed(1)
    sizes = (8, 32, 32, 32, 6)
    layers = [nn.Linear(n, m) for n, m in itertools.pairwise(sizes)]
    pairs = [part for layer in layers for part in (layer, nn.ReLU())]
    host, data = (
        PlainHost(nn.Sequential(*pairs[:-1]), act_step=2.0),
        torch.randn(600, 8),
    )
    names = [layer.name for layer in host.layers]
    regression = Regression(
        Walk(host, host.layers, data, 0),
        forms(host, dict.fromkeys(names, 2)),
        {},
        CONFIG,
    )
    found = regression()

    def mean_output(adapters, shifts):
        host.correct(Correction(adapters, shifts))
        with torch.no_grad():
            mean = only(host.run(data)).mean(0)
        host.correct(Correction())
        return mean

    with torch.no_grad():
        wanted = host.float_net(data).mean(0)
    assert (mean_output(*found) - wanted).abs().max() > 1e-3
    for last in range(1, LAST + 1):
        adapters, shifts = regression.with_whole_means(last)
        again = mean_output(adapters, shifts)
        torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-4)
        for name in names[:-last]:
            assert torch.equal(shifts[name], found[1][name])
        assert not torch.equal(shifts[names[-last]], found[1][names[-last]])
