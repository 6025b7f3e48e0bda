"""Brevitas models are trained by transition rates."""

import copy

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import Int8WeightPerTensorFloat, SignedBinaryWeightPerTensorConst
from toolkit_qat import Trains
from torch import nn
from torch.nn.utils import prune

from cora_plugin.adapters.errors import ModelError
from cora_plugin.integrations.brevitas import load_cora, quantize_ptq, remove_cora
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT
from cora_plugin.qat import TransitionRateScheduler, hosted, param_groups


class TestBrevitas(Trains):
    """Scales of weights are parameters of Brevitas' quantizers."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=3, act_bits=4)
    fashion_options = TOOLKIT.options(weight_bits=3, act_bits=4)

    def own_levels(self, model, name):
        return model.get_submodule(name).quant_weight().int()

    def bare(self, model):
        return remove_cora(model)

    def load(self, path, model, batches):
        load_cora(path, model)

    def plain(self, outputs):
        return getattr(outputs, "value", outputs)

    def switch_off(self, model):
        for module in model.modules():
            if hasattr(module, "weight_quant"):
                module.weight_quant.disable_quant = True

    def test_a_trained_float_weight_is_the_one_after_gptq(self, float_net, batches):
        base = TOOLKIT.quantize(float_net, batches, TOOLKIT.options(gptq=True))
        host = hosted(base.model)
        layer = base.model.stem
        with torch.no_grad(), host.training() as latents:
            for each in latents:
                each.weight.add_(0.01)
        host.renew()
        assert torch.equal(layer.weight_orig, layer.weight)

    def test_alternated_weights_are_refused(self, base):
        TOOLKIT.adapt(base, {"budget": 0.2, "alternations": 3, "metric": "svd"})
        host = hosted(base.model)
        if not host.correction.weights:
            pytest.skip("no alternation was kept")
        with pytest.raises(ModelError, match="alternations=0"), host.training():
            pass


def test_a_scale_that_is_computed_becomes_a_value():
    torch.manual_seed(0)
    layer = qnn.QuantLinear(8, 4, bias=False, weight_quant=Int8WeightPerTensorFloat)
    before = layer.quant_weight()
    optimizer = torch.optim.SGD([layer.weight], 0.1)
    scheduler = TransitionRateScheduler(optimizer, nn.Sequential(layer), steps=3)
    assert torch.allclose(layer.quant_weight().value, before.value)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.allclose(layer.quant_weight().scale, before.scale)
    scheduler.close()
    assert torch.allclose(layer.quant_weight().scale, before.scale)


def test_binary_weights_are_counted():
    layer = qnn.QuantLinear(
        8, 4, bias=False, weight_quant=SignedBinaryWeightPerTensorConst
    )
    layer.weight.data.fill_(0.1)
    with hosted(nn.Sequential(layer)).training() as (latent,):
        before = latent.levels()
        with torch.no_grad():
            layer.weight[0, :3].fill_(-0.1)
        assert int((latent.levels() != before).sum()) == 3


def test_a_shared_weight_is_counted_once():
    first, second = (
        qnn.QuantLinear(8, 8, weight_quant=Int8WeightPerTensorFloat) for _ in range(2)
    )
    second.weight = first.weight
    model = nn.Sequential(first, second)
    with hosted(model).training() as latents:
        assert [each.name for each in latents] == ["0"]
    groups = param_groups(model)
    assert [len(g["params"]) for g in groups if g["name"] == "latents"] == [1]


@pytest.mark.parametrize("wrapped", [torch.nn.DataParallel, torch.compile])
def test_a_wrapped_model_trains_alike(wrapped, monkeypatch):
    """Compiled to a graph that runs eagerly: no C++ compiler is what is tested."""
    batches = [(torch.randn(4, 8), torch.zeros(4)) for _ in range(2)]
    base = quantize_ptq(nn.Sequential(nn.Linear(8, 4)), batches)
    losses = []
    for wrap in (lambda model: model, wrapped):
        model = copy.deepcopy(base).train()
        given = {"backend": "eager"} if wrap is torch.compile else {}
        outer = wrap(model, **given)
        optimizer = torch.optim.SGD(param_groups(outer), 0.1, momentum=0.9)
        with TransitionRateScheduler(optimizer, outer, target=0.05, steps=4) as rates:
            for images, _ in 2 * batches:
                loss = outer(images).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                losses.append((loss.item(), rates.transitions().steps[-1].rate))
    assert losses[:4] == losses[4:]
    assert losses[3][1] > 0


def test_pruned_weights_are_named():
    layer = qnn.QuantLinear(8, 4, weight_quant=Int8WeightPerTensorFloat)
    prune.random_unstructured(layer, "weight", 0.5)
    with pytest.raises(ModelError, match="0: its weight is computed"):
        hosted(nn.Sequential(layer)).training()
