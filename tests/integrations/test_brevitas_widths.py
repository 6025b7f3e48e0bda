"""Bit widths planned for Brevitas."""

from toolkit_widths import MENU, Expands, PlansWidths

from cora_plugin.integrations.brevitas import apply_cora, expand_weights, plan_bits
from cora_plugin.integrations.brevitas.recipe import quantize_ptq
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT


class TestBrevitas(PlansWidths):
    """Brevitas' quantizers are built anew at another width."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=4, first_last_bits=4)
    refused = 0


class TestSeries(Expands):
    """Terms beside the layers of a model that Brevitas quantized."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=3, first_last_bits=3)

    def expanded(self, model, batches, config):
        """Needs no data at all."""
        return expand_weights(model, config)


def test_widths_are_planned_before_gptq_and_it_rounds_at_them(float_net, batches):
    options = TOOLKIT.options(weight_bits=4, gptq=True)
    base = TOOLKIT.quantize(float_net, batches, options)
    adapted, report = TOOLKIT.adapted(base, {"budget": "1.05 ptq", "menu": MENU})
    assert adapted.options.gptq and adapted.options.layer_bits
    assert report.after.value < report.before.value


def test_the_helper_plans_for_a_model_of_the_users_own(float_net, batches):
    model = quantize_ptq(float_net, batches, weight_bits=4)
    settings = {"budget": "1.1 ptq", "menu": MENU}
    plan = plan_bits(batches, model, settings)
    model = quantize_ptq(float_net, batches, weight_bits=4, layer_bits=plan.layer_bits)
    report = apply_cora(batches, model, settings, plan=plan)
    assert report.equivalent_bits <= plan.allowed * (1 + 1e-9)
    assert report.after.value < report.before.value
