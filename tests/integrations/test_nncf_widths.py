"""Bit widths planned for NNCF."""

import pytest
import torch
from toolkit_widths import MENU, Expands, PlansWidths

from cora_plugin import CoRaError
from cora_plugin.integrations.nncf import (
    apply_cora,
    expand_weights,
    plan_bits,
    quantize_ptq,
)
from cora_plugin.integrations.nncf.toolkit import TOOLKIT


class TestNNCF(PlansWidths):
    """NNCF's quantizers take another width as `LayerBits` gives it to them."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=4, first_last_bits=4, depthwise_bits=4)
    refused = 9


class TestSeries(Expands):
    """Terms beside the layers of a model that NNCF quantized."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=3, first_last_bits=3, depthwise_bits=3)

    def expanded(self, model, batches, config):
        """NNCF traces the model; the values of its input do not matter."""
        return expand_weights(model, torch.zeros_like(batches[0][0][:1]), config)


def test_the_helper_plans_for_a_model_of_the_users_own(float_net, batches):
    model = quantize_ptq(float_net, batches, weight_bits=4)
    settings = {"budget": "1.1 ptq", "menu": MENU}
    plan = plan_bits(model, batches, settings)
    model = quantize_ptq(float_net, batches, weight_bits=4, layer_bits=plan.layer_bits)
    report = apply_cora(model, batches, settings, plan=plan)
    assert report.equivalent_bits <= plan.allowed * (1 + 1e-9)
    assert report.after.value < report.before.value


def test_a_menu_without_a_plan_says_what_to_do(float_net, batches):
    with pytest.raises(CoRaError, match=r"^menu: .* call plan_bits"):
        quantize_ptq(
            float_net, batches, weight_bits=4, cora={"budget": "1 ptq", "menu": MENU}
        )
