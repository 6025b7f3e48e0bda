"""Bit widths planned for NNCF."""

import pytest
import torch
from toolkit_widths import MENU, Expands, PlansWidths

from cora_plugin.integrations.nncf import (
    NNCFHost,
    apply_cora,
    expand_weights,
    plan_bits,
    quantize_ptq,
    remove_cora,
)
from cora_plugin.integrations.nncf.toolkit import TOOLKIT


class TestNNCF(PlansWidths):
    """NNCF's quantizers take another width as `LayerBits` gives it to them."""

    toolkit = TOOLKIT
    options = TOOLKIT.options(weight_bits=4, first_last_bits=4, depthwise_bits=4)
    refused = 9

    def applied(self, model, batches, config, **keywords):
        """NNCF's helpers take the model first."""
        return apply_cora(model, batches, config, **keywords)


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


@pytest.mark.parametrize("pinned", [None, {"dil*": 4}])
def test_the_flag_plans_and_adapts_in_one_go(float_net, batches, pinned):
    plain = quantize_ptq(float_net, batches, weight_bits=4, layer_bits=pinned)
    settings = {"budget": "1.0 ptq", "menu": MENU}
    model = quantize_ptq(
        float_net, batches, weight_bits=4, layer_bits=pinned, cora=settings
    )
    report = model.cora_report
    host = NNCFHost(plain, batches[0][0][:1])
    stored = sum(layer.stored_bits for layer in host.layers)
    weights = sum(layer.weight.numel() for layer in host.layers)
    assert report.equivalent_bits <= stored / weights * (1 + 1e-9)
    before = {layer.name: layer.weight_bits for layer in host.layers}
    remove_cora(model)
    after = {
        layer.name: layer.weight_bits
        for layer in NNCFHost(model, batches[0][0][:1]).layers
    }
    assert before != after
    if pinned:
        assert after["dilated"] == 4
