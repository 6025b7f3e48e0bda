"""Brevitas models are trained by transition rates."""

import copy

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import Int8WeightPerTensorFloat, SignedBinaryWeightPerTensorConst
from toolkit_qat import Interrupting, Trains
from torch import nn
from torch.nn.utils import prune

from cora_plugin.adapters.errors import ModelError
from cora_plugin.integrations.brevitas import load_cora, quantize_ptq, remove_cora
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT
from cora_plugin.qat import TransitionRateScheduler, finetune, hosted, param_groups
from cora_plugin.testing import images
from cora_plugin.testing.checks import assert_same_state


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


class Own(nn.Module):
    """Layers as Brevitas' tutorials have them: scales are statistics."""

    def __init__(self, **settings):
        super().__init__()
        self.first = qnn.QuantConv2d(3, 8, 3, weight_bit_width=4, **settings)
        self.act = qnn.QuantReLU(bit_width=4)
        self.last = qnn.QuantLinear(8, 4, True, weight_bit_width=4, **settings)

    def forward(self, x):
        return self.last(self.act(self.first(x)).mean((2, 3)))


def own(**settings):
    """One whose activations' ranges Brevitas goes on to measure for 300 steps."""
    torch.manual_seed(0)
    model = Own(**settings).train()
    with torch.no_grad():
        for x in images(64, 1).split(16):
            model(x)
    return model.eval()


def float_of(model):
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    conv.load_state_dict(model.first.state_dict(), strict=False)
    linear.load_state_dict(model.last.state_dict(), strict=False)
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    linear.bias.data += torch.linspace(-1, 1, 4)  # Something to learn.
    return net.eval()


def tuned(model, loader=None, **settings):
    return finetune(
        model,
        images(128, 2).split(16) if loader is None else loader,
        reference=float_of(own()),
        held_out=images(64, 3).split(16),
        **settings,
    )


@pytest.mark.parametrize("method", ["trs", "lr"])
def test_a_model_whose_ranges_are_measured_is_left_unchanged(method):
    model, x = own(), images(16, 4)
    before, outputs = copy.deepcopy(model.state_dict()), model(x)
    settings = {"optimizer": "sgd", "lr": 1e3, "other_lr": 1e3}
    assert not tuned(model, method=method, **settings).kept
    assert_same_state(model, before)
    assert torch.equal(model(x), outputs)
    Own().load_state_dict(model.state_dict())  # No scale is a parameter of it.


@pytest.mark.parametrize("method", ["trs", "lr"])
def test_a_model_whose_ranges_are_measured_is_resumed(method, tmp_path):
    """They are parameters as soon as it is trained."""
    settings = {"method": method, "lr": 1e-3, "epochs": 2}
    whole, model, again = own(), own(), own()
    expected = tuned(whole, **settings)
    assert expected.kept
    loader = Interrupting(images(128, 2).split(16), 1 + 8 + 5)
    settings["checkpoint"] = tmp_path / "qat.pt"
    with pytest.raises(KeyboardInterrupt):
        tuned(model, loader, **settings)
    report = tuned(again, **settings)
    assert list(report.losses) == list(expected.losses)
    assert_same_state(again, whole.state_dict())
    scale = "act.act_quant.fused_activation_quant_proxy.tensor_quant.scaling_impl.value"
    assert again.get_parameter(scale) != own().state_dict()[scale]


def test_ranges_that_were_never_measured_are_refused():
    with pytest.raises(ModelError, match=r"act\..*: has no value yet; calibrate"):
        tuned(Own())


def test_scales_that_began_as_statistics_are_stored_with_the_weights():
    """A model whose scales are parameters reads what such a training wrote."""
    model = own()
    tuned(model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Own().load_state_dict(model.state_dict())
    again = Own(weight_scaling_impl_type="parameter_from_stats").eval()
    again.load_state_dict(model.state_dict())
    x = images(16, 4)
    assert torch.equal(again(x), model(x))
