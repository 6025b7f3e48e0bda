"""What NNCF makes of a model that adapters cannot serve is said, with the way out."""

import nncf
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from cora_plugin import CoRaError
from cora_plugin.integrations.nncf import CoRaQuantizationParameters, apply_cora

X = [torch.randn(8, 3, 12, 12) for _ in range(4)]


class Net(nn.Module):
    def __init__(self, wrap=lambda layer: layer):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3)
        self.two = wrap(nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3)))


def bare():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, 4)).eval()


def test_compressed_weights_are_told():
    mode = nncf.CompressWeightsMode.INT8_SYM
    model = nncf.compress_weights(Net().eval(), mode=mode, dataset=nncf.Dataset(X))
    with pytest.raises(CoRaError, match=r"nncf\.compress_weights, .*by nncf\.quantize"):
        apply_cora(model, X)


def test_a_bare_sequential_is_refused_by_the_flag():
    parameters = CoRaQuantizationParameters(cora="budget=0.1")
    with pytest.raises(CoRaError, match=r"wrap it .* before nncf\.quantize"):
        nncf.quantize(bare(), nncf.Dataset(X), advanced_parameters=parameters)


def test_a_weight_that_is_computed_is_left_alone_with_the_way_out():
    model = nncf.quantize(Net(weight_norm).eval(), nncf.Dataset(X))
    report = apply_cora(model, X, "budget=0.2")
    (why,) = report.skipped.values()
    assert "computed" in why and "remove_parametrizations" in why
