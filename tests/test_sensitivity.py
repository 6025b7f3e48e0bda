from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from cora_plugin import CoRaConfig
from cora_plugin.adapters import Operation
from cora_plugin.adapters.factor import weighted_error
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import KL, measure
from cora_plugin.statistics import InputMoments, collect_sensitivities, weighting


class OneLayer:
    """A host of one linear layer in a float net."""

    def __init__(self, net, name):
        self.net = net
        self.module = net.get_submodule(name)
        weight = self.module.weight.detach().clone()
        self.layer = QuantizedLayer(name, weight, weight, Operation(), 4.0, 0)

    def acting(self, weights=None, shifts=None, quantized=True):
        assert not quantized
        return nullcontext()

    @contextmanager
    def observe(self, observer):
        hook = self.module.register_forward_hook(
            lambda _, inputs, output: observer(self.layer.name, inputs[0], output)
        )
        with hook:
            yield

    def run(self, images):
        return {"": self.net(images)}


@pytest.fixture
def host():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).requires_grad_(
        False
    )
    net[2].weight *= 3
    return OneLayer(net, "0")


def test_at_the_logits_it_is_the_fisher_matrix_of_the_softmax(host):
    last = OneLayer(host.net, "2")
    torch.manual_seed(1)
    images = torch.randn(5, 6).repeat(4000, 1)
    config = CoRaConfig()
    found = collect_sensitivities(last, [last.layer], images.split(2000), KL(), config)
    p = host.net(images[:5]).softmax(1).double()
    expected = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    torch.testing.assert_close(found["2"][0], expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_half_the_weighted_error_of_a_small_residual_is_the_divergence(host, seed):
    torch.manual_seed(2)
    images = torch.randn(20_000, 6)
    moments = InputMoments(host.layer, "second", 100, 0)
    moments.update(images, host.module(images))
    config = CoRaConfig(seed=seed)
    found = collect_sensitivities(host, [host.layer], [images], KL(), config)
    metric = weighting(host.layer, moments.mean(), found["0"], 0.0)
    reference = host.net(images)
    torch.manual_seed(seed)
    residual = 0.02 * torch.randn(8, 6)
    predicted = weighted_error(residual[None], metric) / 2
    host.module.weight += residual
    actual = measure(KL(), {"": reference}, {"": host.net(images)}).kl
    # Inputs and gradients are taken as independent, which they are not quite.
    assert predicted == pytest.approx(actual, rel=0.3)


def test_labels_are_drawn_by_the_seed_alone(host):
    images = torch.randn(50, 6, generator=torch.Generator().manual_seed(3))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        config = CoRaConfig(seed=seed)
        found.append(
            collect_sensitivities(host, [host.layer], [images], KL(), config)["0"]
        )
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_weights_get_no_gradients(host):
    collect_sensitivities(host, [host.layer], [torch.randn(5, 6)], KL(), CoRaConfig())
    assert all(parameter.grad is None for parameter in host.net.parameters())
