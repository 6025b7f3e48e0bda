"""The refinement lowers the divergence, and only ever keeps what does."""

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, distance, net

from cora_plugin import CoRa, CoRaError
from cora_plugin.adapters import make_adapter
from cora_plugin.adapters.factor import Weighting
from cora_plugin.fitting.distillation import Trained


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("bits", [8, 32])
def test_it_brings_a_network_nearer(scope, bits):
    test, config = batches(1, seed=9)[0], {"budget": 0.2, "adapter_bits": bits}
    plain = PlainHost(net(), bits=2)
    CoRa(config).apply(plain, batches())
    host = PlainHost(net(), bits=2)
    fit = {"iterations": 60, "scope": scope, "lr": 0.01}
    report = CoRa({**config, "refine": fit}).apply(host, batches())
    assert report.steps[-1].name == "refinement"
    assert report.steps[-1].kept
    assert 0 < report.fit_iterations <= 60
    assert report.fit_images == 77  # four fifths of 96
    assert "refined in" in str(report)
    assert distance(host, test) < distance(plain, test)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("bits", [8, 32])
def test_it_starts_from_the_adapter_and_ends_in_one(index, bits):
    layer = PlainHost(net(), bits=2).layers[index]
    metric = Weighting()
    for rank in (1, layer.full_rank):
        adapter = make_adapter(layer.residual, layer.operation, rank, metric, bits)
        trained = Trained(layer, adapter, None)
        expected = layer.dequantized + adapter.merged()
        torch.testing.assert_close(trained.weight().detach(), expected)
        trained.weight().square().sum().backward()
        assert all(factor.grad.any() for factor in trained.factors.values())
        with torch.no_grad():
            for factor in trained.factors.values():
                factor += 0.3 * torch.randn_like(factor)
        expected = layer.dequantized + trained.adapter().merged()
        torch.testing.assert_close(trained.weight().detach(), expected)


def test_a_loss_that_is_not_finite_stops_it_and_leaves_the_model():
    host, test = PlainHost(net()), batches(1, seed=9)[0]
    before = distance(host, test)
    fit = {"iterations": 20, "lr": 1e30}
    with pytest.raises(
        CoRaError, match=r"refine: the loss is (nan|inf) .*lower refine\.lr"
    ):
        CoRa({"budget": 0.2, "refine": fit}).apply(host, batches())
    assert distance(host, test) == before


def test_what_does_not_help_is_not_kept():
    host = PlainHost(net(), bits=4)
    fit = {"iterations": 12, "lr": 30.0, "every": 2, "patience": 2}
    report = CoRa({"budget": 0.3, "refine": fit}).apply(host, batches())
    assert not report.steps[-1].kept
    assert report.fit_iterations == 4
    assert report.after == [step.after for step in report.steps if step.kept][-1]
