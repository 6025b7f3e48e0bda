"""Models that NNCF quantized are trained by transition rates."""

import nncf
import pytest
import torch
from toolkit_qat import Trains
from torch import nn
from torch.nn import functional

from cora_plugin.adapters.errors import ModelError
from cora_plugin.integrations.nncf import NNCFHost, load_cora, remove_cora
from cora_plugin.integrations.nncf.toolkit import TOOLKIT
from cora_plugin.qat import hosted


def quantizers(model):
    from nncf.torch.quantization.layers import BaseQuantizer

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseQuantizer)
    }


class TestNNCF(Trains):
    """Scales of weights are parameters of the quantizers in NNCF's hooks."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=3, act_bits=4, depthwise_bits=3)
    fashion_options = TOOLKIT.options(weight_bits=3, act_bits=4)

    def own_levels(self, model, name):
        (quantizer,) = (
            module
            for path, module in quantizers(model).items()
            if f"pre_hooks.{name}/" in path
        )
        weight = model.get_submodule(name).weight
        low, high = quantizer.get_input_low_input_high()
        step = (high - low) / (quantizer.levels - 1)
        levels = quantizer(weight).detach() / step
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        return levels.round()

    def bare(self, model):
        return remove_cora(model)

    def load(self, path, model, batches):
        load_cora(path, model, batches[0][0])

    def plain(self, outputs):
        return outputs

    def switch_off(self, model):
        for quantizer in quantizers(model).values():
            quantizer.disable_quantization()

    def test_norms_are_frozen_or_measured_anew(self, quantized, float_net, unseen):
        frozen, estimated = (quantized.copied().model for _ in range(2))
        statistics = frozen.stem_bn.running_mean.clone()
        report = self.tune(frozen, float_net, unseen)
        assert "frozen" in report.norms
        assert torch.equal(frozen.stem_bn.running_mean, statistics)
        report = self.tune(estimated, float_net, unseen, norms="estimated")
        assert "2 measured anew" in report.norms
        if report.kept:
            assert not torch.equal(estimated.stem_bn.running_mean, statistics)
        assert estimated.stem_bn.momentum == frozen.stem_bn.momentum


class Functional(nn.Module):
    """Calls one weight twice, and one layer's."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Parameter(torch.randn(8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = functional.relu(functional.linear(x, self.twice))
        return self.last(functional.linear(x, self.twice))


def test_weights_of_functions_take_an_example_and_count_once():
    torch.manual_seed(0)
    data = [torch.randn(4, 8) for _ in range(4)]
    model = nncf.quantize(Functional().eval(), nncf.Dataset(data))
    with pytest.raises(ModelError, match="carrying=True"):
        hosted(model).training()
    with NNCFHost(model, data[0], carrying=True).training() as latents:
        weights = [each.weight for each in latents]
    assert len(weights) == 2
    assert {id(w) for w in weights} == {id(model.twice), id(model.last.weight)}
