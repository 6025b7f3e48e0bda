"""Series terms on the plain host: with data as a search, and without any."""

import json

import pytest
import torch
from plain_host import PlainHost, quantized_copy
from small_net import batches, distance, net
from torch import nn

from cora_plugin import CoRa, CoRaError
from cora_plugin.layer import Correction
from cora_plugin.series import expand_weights
from cora_plugin.testing.checks import assert_same_state


def away(host):
    """The distance to the float model on images that calibrated nothing."""
    return distance(host, batches(1, seed=9)[0])


def test_more_terms_are_nearer_without_any_data():
    left = []
    for terms in (1, 2, 3):
        host = PlainHost(net())
        report = expand_weights(host, {"terms": terms, "adapter_bits": 2})
        left.append(away(host))
        for before, after in report.errors.values():
            assert after == pytest.approx(before / 3**terms, rel=0.35)
        assert report.equivalent_bits - report.equivalent_bits_before > 2 * terms
    assert away(PlainHost(net())) > left[0] > left[1] > left[2]


def test_terms_without_data_are_those_of_the_search():
    report = CoRa(
        {"search": "series", "terms": 2, "adapter_bits": 3, "bias_correction": "off"}
    ).apply(one := PlainHost(net()), batches())
    expand_weights(other := PlainHost(net()), {"terms": 2, "adapter_bits": 3})
    assert away(one) == away(other)
    assert {row.kind for row in report.layers} == {"whole + whole"}
    text = " ".join(str(report).split())
    assert "2 x 3 bits beside each layer, whatever the budget" in text
    names = [step.name for step in report.steps]
    assert "regression" not in names
    assert report.budget_used == report.budget_allowed


def test_layers_at_rank_zero_are_left_alone_and_it_can_be_undone():
    host = PlainHost(net())
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    name = host.layers[0].name
    report = expand_weights(host, {"ranks": {name: 0}})
    assert name not in report.errors
    assert report.skipped[name] == "rank 0 was asked for"
    host.correct(Correction())
    assert_same_state(host.model, before)


def test_the_report_as_text_and_json(tmp_path):
    report = expand_weights(PlainHost(net()))
    assert "1 x 4 bits beside each layer" in str(report)
    report.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read["config"]["search"] == "series"
    assert read["equivalent_bits"] == report.equivalent_bits


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sweep": [0.1]}, "^sweep: search=series"),
        ({"budget": "0.1 kl"}, "^budget: search=series"),
        ({"menu": [4, 8], "budget": "1 ptq"}, "^menu: search=series"),
        ({"terms": 0}, "^terms: 0 is out of range"),
    ],
)
def test_what_a_series_has_no_use_for(settings, message):
    with pytest.raises(CoRaError, match=message):
        CoRa({"search": "series", **settings})


def test_a_term_that_is_not_worth_its_bits_is_not_bought():
    """Whole terms of few bits are among what the search buys where bits count."""
    kinds = {}
    for widths in ([], [2, 3]):
        host = PlainHost(net())
        config = {"budget": "2.2 bits", "term_bits": widths, "regression": False}
        report = CoRa(config).apply(host, batches())
        kinds[len(widths)] = {row.adapter_bits / row.weights for row in report.layers}
        assert report.equivalent_bits <= report.equivalent_bits_before + 2.2
    assert kinds[0] != kinds[2]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_factors_may_have_the_bits_of_a_term(bits):
    config = {"budget": "2.2 bits", "adapter_bits": bits, "regression": False}
    report = CoRa(config).apply(PlainHost(net()), batches())
    assert report.equivalent_bits <= report.equivalent_bits_before + 2.2


def test_a_term_behind_factors_is_bought_where_a_direction_stands_out():
    """Its steps are as wide as what it rounds, which factors make narrower."""
    torch.manual_seed(0)
    model = quantized_copy(nn.Sequential(nn.Linear(64, 64)))
    model[0].plain.weight += torch.randn(64, 1) * torch.randn(64)
    host, inputs = PlainHost(model), [torch.randn(16, 64) for _ in range(20)]
    config = {"budget": "3 bits", "adapter_bits": 8, "objective": "mse"}
    report = CoRa({**config, "regression": False}).apply(host, inputs)
    assert [row.kind for row in report.layers] == ["low-rank + whole"]
    assert report.budget_used <= report.budget_allowed


def test_terms_may_stand_behind_factors():
    """An adapter of several terms leaves less than its first one alone."""
    from cora_plugin.adapters import Factors, Form
    from cora_plugin.adapters.factor import Weighting

    layer = PlainHost(net()).layers[1]
    factors = Factors.of(layer.residual, layer.operation, Weighting(), layer.name)
    shape, groups = tuple(layer.weight.shape), layer.operation.groups
    low = Form.smallest(2, 4, shape, groups)
    whole = Form.whole(2, shape, groups)
    left = [
        float((layer.residual - factors.adapter_of(forms).merged()).norm())
        for forms in ((low,), (whole,), (low, whole))
    ]
    assert left[2] < min(left[:2])
    assert torch.equal(
        factors.adapter_of((low,)).merged(), factors.adapter(2, 4).merged()
    )
