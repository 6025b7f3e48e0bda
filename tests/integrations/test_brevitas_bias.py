"""Brevitas' bias correction behind adapters: done where it helps, else left out."""

import copy
import logging

import pytest
from brevitas_examples.imagenet_classification.ptq.ptq_common import (
    apply_bias_correction,
    apply_gptq,
)
from untouched import untouched

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.integrations.brevitas import apply_cora, snapshot
from cora_plugin.integrations.brevitas.bias import apply_cora_and_correct_biases
from cora_plugin.testing.checks import assert_same_state

HELPS = {"metric": "svd", "budget": 0.02, "bias_correction": "off"}
HARMS = {"budget": 0.3, "metric": "qera-exact"}


@pytest.fixture
def model(prototypes):
    return copy.deepcopy(prototypes["layerwise"])


def test_it_is_done_where_it_helps(model, batches):
    by_hand = copy.deepcopy(model)
    report = apply_cora_and_correct_biases(batches, model, HELPS)
    step = report.steps[-1]
    assert step.kept and step.after.kl < step.before.kl
    assert report.after == step.after
    assert "Brevitas' bias correction: KL" in str(report)
    apply_cora(batches, by_hand, HELPS)
    apply_bias_correction(batches, by_hand)
    assert_same_state(model, by_hand.state_dict())


def test_it_is_left_out_where_it_harms(model, batches, caplog):
    by_hand = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING):
        report = apply_cora_and_correct_biases(batches, model, HARMS)
    step = report.steps[-1]
    assert not step.kept and step.after.kl >= step.before.kl
    assert "bias correction: left out" in caplog.text
    alone = apply_cora(batches, by_hand, HARMS)
    assert report.after == alone.after
    assert_same_state(model, by_hand.state_dict())
    assert step.before.kl == pytest.approx(report.after.kl, rel=0.02)


def test_float_weights_that_the_model_has_lost_are_the_measure(model, batches):
    floats = snapshot(model)
    apply_gptq(batches, model, act_order=True)  # overwrites them
    alone = apply_cora(batches, copy.deepcopy(model), HELPS, floats)
    report = apply_cora_and_correct_biases(batches, model, HELPS, floats)
    assert report.steps[-1].before.kl == pytest.approx(alone.after.kl, rel=0.02)


def test_bad_data_leaves_the_model_as_it_was(model, batches):
    with untouched(model), pytest.raises(CoRaError, match="too few"):
        apply_cora_and_correct_biases([], model, HELPS)
    broken = [(batches[0][0] * float("nan"), batches[0][1])]
    with untouched(model), pytest.raises(CoRaError, match="NaN"):
        apply_cora_and_correct_biases(broken, model, HELPS)
