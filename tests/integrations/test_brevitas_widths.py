"""Bit widths planned for Brevitas."""

import pytest
import torch
from toolkit_widths import MENU, Expands, PlansWidths

from cora_plugin import CoRaError
from cora_plugin.integrations.brevitas import (
    apply_cora,
    expand_weights,
    plan_bits,
    remove_cora,
)
from cora_plugin.integrations.brevitas.recipe import quantize_ptq
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT


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
