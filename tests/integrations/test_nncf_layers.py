"""What NNCF makes of a model that adapters cannot serve is said, with the way out."""

import re

import nncf
import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from cora_plugin import CoRaError
from cora_plugin.host import LEFT_FLOAT
from cora_plugin.integrations.computed import make_copyable
from cora_plugin.integrations.nncf import (
    CoRaQuantizationParameters,
    apply_cora,
    quantize_ptq,
)

X = [torch.randn(8, 3, 12, 12) for _ in range(4)]


KEEP = nn.Identity()


class Net(nn.Module):
    def __init__(self, two=KEEP, head=KEEP):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3)
        self.two = two(nn.Conv2d(8, 8, 3))
        self.head = head(nn.Linear(8, 4))

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


FLAG = CoRaQuantizationParameters(cora="budget=0.2")
WRAPS = {"parametrized": weight_norm, "hooked": old_weight_norm}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("flag", [None, FLAG], ids=["apply_cora", "flag"])
@pytest.mark.parametrize("name", ["two", "head"])
def test_a_weight_that_is_computed_is_left_alone_with_the_way_out(name, flag, wrap):
    net = Net(**{name: wrap}).eval()
    if not flag:
        make_copyable(net)  # NNCF copies it.
    model = nncf.quantize(net, nncf.Dataset(X), advanced_parameters=flag)
    report = model.cora_report if flag else apply_cora(model, X, "budget=0.2")
    assert [*report.skipped] == [name]
    assert re.search(
        rf"before nncf.quantize: .*\(model\.{name}\b", report.skipped[name]
    )


def test_a_computed_weight_that_nncf_fails_at_is_told_with_the_way_out():
    net = Net(two=orthogonal).eval()
    with pytest.raises(CoRaError, match=r"pickle.*; two: .* parametrization Orthogona"):
        nncf.quantize(net, nncf.Dataset(X), advanced_parameters=FLAG)


@pytest.mark.parametrize("wrap", [*WRAPS.values(), orthogonal])
def test_computed_weights_are_stored_by_the_recipe(wrap):
    net = Net(two=wrap, head=wrap).eval()
    with torch.no_grad():
        expected = net(X[0])
    model = quantize_ptq(net, X, cora="budget=0.2")
    names = [layer.name for layer in model.cora_report.layers]
    assert names == ["one", "two", "head"] and not model.cora_report.skipped
    with torch.no_grad():
        error = (model(X[0]) - expected).square().mean() / expected.square().mean()
    assert error < 0.01


def test_layers_that_nncf_leaves_in_float_are_listed():
    """Depthwise `Conv1d`, and those of an ignored scope."""
    net = nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=8), nn.ReLU())
    x = [torch.randn(8, 3, 20) for _ in range(3)]

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = net, nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.net(x).mean(2))

    scope = nncf.IgnoredScope(names=["head/linear/0"])
    model = nncf.quantize(Deep().eval(), nncf.Dataset(x), ignored_scope=scope)
    report = apply_cora(model, x, "budget=0.5")
    assert [row.name for row in report.layers] == ["net.0"]
    assert report.skipped == dict.fromkeys(("net.1", "head"), LEFT_FLOAT)
