"""Computed weights are found, told with the way out, and stored without a change."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from cora_plugin.integrations.computed import computed, stored_weights


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def halved(layer):
    parametrize.register_parametrization(layer, "weight", Half())
    return layer


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


WAYS = {
    "parametrization _WeightNorm": parametrizations.weight_norm,
    "parametrization _SpectralNorm": parametrizations.spectral_norm,
    "parametrization Half": halved,
    "torch.nn.utils.weight_norm": old_weight_norm,
    "torch.nn.utils.spectral_norm": old_spectral_norm,
    "torch.nn.utils.prune": pruned,
}
every_way = pytest.mark.parametrize("by", WAYS)


def net(by):
    torch.manual_seed(0)
    two = WAYS[by](nn.Conv2d(8, 8, 3))
    return nn.Sequential(nn.Conv2d(3, 8, 3), two, nn.Flatten(), nn.Linear(512, 4))


@every_way
def test_the_way_out_is_what_it_says(by):
    model = net(by).eval()
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    how = computed(model[1])
    reason = how.reason("1", "nncf.quantize")
    assert f"computed by {'the ' * by.startswith('par')}{by.replace(' _', ' ')} " in (
        reason
    )
    assert "before nncf.quantize: torch.nn.utils." in reason
    call = reason.partition("before nncf.quantize: ")[2].replace("model.1", "model[1]")
    exec(call)
    assert computed(model[1]) is None
    torch.testing.assert_close(model(x), expected)


@every_way
def test_weights_are_stored_in_a_copy(by):
    model = net(by)
    x = torch.randn(2, 3, 12, 12)
    model(x).sum().backward()  # Hooks leave a weight with gradients, which is no leaf.
    with torch.no_grad():
        stored = stored_weights(model)
        assert computed(stored[1]) is None and computed(model[1]) is not None
        torch.testing.assert_close(stored(x), model.eval()(x))
    assert "weight" in dict(stored[1].named_parameters())


def test_a_model_that_stores_its_weights_is_left_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert stored_weights(model) is model
