"""Bit widths planned for Brevitas."""

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import (
    Fp8e4m3OCPWeightPerTensorFloat,
    Int8WeightPerChannelFloat,
    MXFloat8e4m3Weight,
    SignedBinaryWeightPerTensorConst,
)
from toolkit_widths import MENU, Expands, PlansWidths
from torch import nn

from cora_plugin import CoRaError
from cora_plugin.integrations.brevitas import (
    BrevitasHost,
    apply_cora,
    expand_weights,
    plan_bits,
    remove_cora,
)
from cora_plugin.integrations.brevitas.recipe import quantize_ptq
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT
from cora_plugin.testing.checks import assert_same_state


class TestBrevitas(PlansWidths):
    """Brevitas' quantizers are built anew at another width."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=4, first_last_bits=4)
    refused = 0

    def applied(self, model, batches, config, **keywords):
        """Brevitas' helpers take the data first."""
        return apply_cora(batches, model, config, **keywords)


class TestSeries(Expands):
    """Terms beside the layers of a model that Brevitas quantized."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=3, first_last_bits=3)

    def expanded(self, model, batches, config):
        """Needs no data at all."""
        return expand_weights(model, config)


@pytest.mark.parametrize(
    ("rounding", "budget"), [("gptq", "1.1 ptq"), ("qronos", "1.0 ptq")]
)
def test_never_further_than_at_the_widths_that_the_model_has(
    rounding, budget, float_net, batches
):
    options = TOOLKIT.options(weight_bits=4, first_last_bits=4, **{rounding: True})
    base = TOOLKIT.quantize(float_net, batches, options)
    alone = TOOLKIT.adapt(base.copied(), {"budget": budget})
    adapted, report = TOOLKIT.adapted(base, {"budget": budget, "menu": MENU})
    assert report.after.value <= alone.after.value
    assert report.equivalent_bits <= alone.equivalent_bits_before * float(budget[:3])
    (note,) = (e for e in report.notes if e.startswith("rounded as the recipe has it"))
    kept = adapted.model is base.model
    assert kept == (report.plan is None) == note.endswith("which are kept")


def test_widths_are_planned_before_gptq_and_it_rounds_at_them(
    float_net, batches, unseen
):
    options = TOOLKIT.options(weight_bits=4, gptq=True)
    base = TOOLKIT.quantize(float_net, batches, options)
    with pytest.raises(CoRaError, match="plan bit widths before it"):
        TOOLKIT.plan(base, {"budget": "0.9 ptq", "menu": MENU})
    # The given model stores more than that, and is not judged.
    adapted, report = TOOLKIT.adapted(base, {"budget": "0.9 ptq", "menu": MENU})
    assert adapted.options.gptq and adapted.options.layer_bits
    assert report.plan is not None
    anew = TOOLKIT.quantize(float_net, batches, adapted.options).model
    assert torch.equal(
        TOOLKIT.outputs(remove_cora(adapted.model), unseen),
        TOOLKIT.outputs(anew, unseen),
    )
    assert report.after.value < report.before.value


def test_the_helper_plans_for_a_model_of_the_users_own(float_net, batches):
    model = quantize_ptq(float_net, batches, weight_bits=4)
    settings = {"budget": "1.1 ptq", "menu": MENU}
    plan = plan_bits(batches, model, settings)
    model = quantize_ptq(float_net, batches, weight_bits=4, layer_bits=plan.layer_bits)
    report = apply_cora(batches, model, settings, plan=plan)
    assert report.equivalent_bits <= plan.allowed * (1 + 1e-9)
    assert report.after.value < report.before.value


class TrainedScale(Int8WeightPerChannelFloat):
    """A scale that training moves away from the weight's range."""

    scaling_impl_type = "parameter_from_stats"


def of_two(quantizer):
    """A network whose second layer has this weight quantizer."""
    torch.manual_seed(0)
    return nn.Sequential(
        qnn.QuantConv2d(3, 16, 3, padding=1, weight_bit_width=4),
        nn.ReLU(),
        qnn.QuantConv2d(16, 32, 3, weight_quant=quantizer, weight_bit_width=4),
        nn.ReLU(),
        nn.Flatten(),
    ).eval()


def test_a_width_that_a_layer_has_is_its_own_quantizer():
    model = of_two(TrainedScale)
    model[2].quant_weight()
    with torch.no_grad():
        model[2].weight_quant.tensor_quant.scaling_impl.value.mul_(0.7)
    host = BrevitasHost(model)
    layers = {layer.name: layer for layer in host.layers}
    floats = {name: layer.weight for name, layer in layers.items()}
    made = host.quantize(floats, dict.fromkeys(floats, 4))
    for name, layer in layers.items():
        assert torch.equal(made[name], layer.dequantized)
    assert not torch.equal(
        host.quantize(floats, dict.fromkeys(floats, 5))["2"], made["2"]
    )


@pytest.mark.parametrize(
    "quantizer",
    [
        SignedBinaryWeightPerTensorConst,
        Fp8e4m3OCPWeightPerTensorFloat,
        MXFloat8e4m3Weight,
    ],
)
def test_quantizers_without_another_width_are_named_and_can_be_pinned(
    quantizer, unseen
):
    model = of_two(quantizer)
    own = {layer.name: layer.weight_bits for layer in BrevitasHost(model).layers}
    assert own == {"0": 4, "2": 1 if "Binary" in quantizer.__name__ else 8}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = unseen.split(16)
    with pytest.raises(CoRaError, match=r"^2: .* at 3 bits \(it stays at .* so pin"):
        apply_cora(data, model, {"budget": "1.2 ptq", "menu": MENU})
    assert_same_state(model, before)
    settings = {"budget": "1.3 ptq", "menu": MENU}
    plan = plan_bits(data, model, settings, pinned={"2": int(own["2"])})
    assert plan.widths["2"] == own["2"]


def test_widths_are_not_planned_behind_learned_rounding(float_net, batches):
    options = TOOLKIT.options(learned_round="layer", learned_round_iters=2)
    model = TOOLKIT.quantize(float_net, batches[:1], options).model
    with pytest.raises(CoRaError, match=r"learned round .* plan bit widths before it"):
        plan_bits(batches, model, {"budget": "1.2 ptq", "menu": MENU})
    apply_cora(batches, model, 0.3)
