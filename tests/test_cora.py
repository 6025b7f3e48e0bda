"""CoRa on a host without a toolkit: plain torch, weights rounded a channel."""

import dataclasses
import json
import logging

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, distance, net
from torch import nn

from cora_plugin import CoRa, CoRaConfig, CoRaError
from cora_plugin.config import SEARCHES
from cora_plugin.layer import Correction
from cora_plugin.outputs import only

FEW = {"butterworth": {"iterations": 30}}


@pytest.mark.parametrize("unit", ["params", "bits", "macs"])
@pytest.mark.parametrize("search", SEARCHES)
def test_adapters_bring_the_model_nearer_and_hold_the_budget(search, unit):
    host, test = PlainHost(net()), batches(1, seed=9)[0]
    before = distance(host, test)
    amount = {"params": 0.2, "bits": 2.0, "macs": 0.2}[unit]
    config = {**FEW, "budget": f"{amount} {unit}", "search": search}
    report = CoRa(config).apply(host, batches())
    assert report.steps[0].kept
    assert 0 < report.budget_used <= report.budget_allowed
    assert distance(host, test) < before


@pytest.mark.parametrize("metric", ["svd", "lqer", "qera-approx", "qera-exact"])
def test_every_metric_works_with_every_search(metric):
    for search in SEARCHES:
        host = PlainHost(net())
        config = {**FEW, "budget": 0.3, "metric": metric, "search": search}
        report = CoRa(config).apply(host, batches())
        assert report.after.kl < report.before.kl


def test_a_regression_follows_the_closed_form_in_any_metric():
    settings = {"budget": 0.3, "metric": "svd"}
    names = {
        flag: [
            step.name
            for step in CoRa({**settings, "regression": flag})
            .apply(PlainHost(net()), batches())
            .steps
        ]
        for flag in (None, False, True)
    }
    assert names[None] == names[False]
    assert "regression" not in names[False]
    assert names[True][:3] == ["adapters", "bias correction", "regression"]


def test_the_report_says_what_activations_cost_and_what_answers_for_them():
    reports = {}
    for regression in (False, True):
        host = PlainHost(net(), bits=2, act_step=0.25)
        config = {"budget": 0.5, "regression": regression, "bias_correction": "off"}
        reports[regression] = report = CoRa(config).apply(host, batches())
        floats = {layer.name: layer.weight for layer in host.layers}
        host.correct(Correction())
        held_out = [x for i, x in enumerate(torch.cat(batches())) if i % 5 == 4]
        with torch.no_grad(), host.acting(floats):
            expected = distance(host, torch.stack(held_out))
        assert report.activations.kl == pytest.approx(expected, rel=1e-3)
    plain, whole = reports[False], reports[True]
    assert plain.activations.kl > plain.after.kl / 2
    assert "most of what is left; regression=true answers for them" in str(plain)
    assert "quantized activations alone" in str(whole)
    assert "answers for them" not in str(whole)

    report = CoRa("budget=0.2").apply(PlainHost(net()), batches())
    assert report.activations.kl < 1e-6  # They are float.
    assert "answers for them" not in str(report)


def test_full_ranks_in_float_restore_the_float_model():
    host, test = PlainHost(net(), bits=2), batches(1, seed=9)[0]
    full = {layer.name: layer.full_rank for layer in host.layers}
    CoRa({"budget": 1, "ranks": full, "adapter_bits": 32}).apply(host, batches())
    with torch.no_grad():
        torch.testing.assert_close(
            only(host.run(test)), host.float_net(test), rtol=1e-4, atol=1e-5
        )


def test_the_budget_counts_what_is_stored():
    host = PlainHost(net())
    report = CoRa({"budget": "1.5 bits"}).apply(host, batches())
    weights = sum(layer.weight.numel() for layer in host.layers)
    added = sum(row.adapter_bits for row in report.layers)
    assert report.budget_used == added
    assert report.equivalent_bits == pytest.approx(
        report.equivalent_bits_before + added / weights
    )
    assert report.equivalent_bits_before == pytest.approx(
        sum(3 * e.weight.numel() + 32 * len(e.weight) for e in host.layers) / weights
    )


@pytest.mark.parametrize("search", SEARCHES)
def test_the_same_seed_gives_the_same_adapters(search):
    config = {**FEW, "budget": 0.2, "search": search}
    reports = []
    for _ in range(2):
        report = CoRa(config).apply(PlainHost(net()), batches()).to_dict()
        del report["seconds"]
        reports.append(report)
    assert reports[0] == reports[1]


class Worsening(PlainHost):
    """Plants adapters that double the error instead of mending it."""

    def correct(self, correction):
        super().correct(correction)
        for branch in self.branches.values():
            branch.a.neg_().mul_(8)


def test_the_guard_takes_a_bad_step_back_and_says_so(caplog):
    host, test = Worsening(net(), bits=6), batches(1, seed=9)[0]
    before = distance(host, test)
    with caplog.at_level(logging.WARNING):
        config = {"budget": 0.2, "bias_correction": "off"}
        report = CoRa(config).apply(host, batches())
    assert not report.steps[0].kept
    assert report.after == report.before
    assert report.equivalent_bits == report.equivalent_bits_before
    assert all(row.rank == 0 for row in report.layers)
    assert distance(host, test) == before
    assert "adapters: taken back" in caplog.text
    assert "rolled back" in str(report)


def test_biases_are_corrected_where_adapters_do_not_help():
    host, test = Worsening(net(), bits=2), batches(1, seed=9)[0]
    before = distance(host, test)
    config = {"budget": 0.2, "metric": "qera-exact"}
    report = CoRa(config).apply(host, batches())
    *adapters, correction = report.steps
    assert not any(step.kept for step in adapters)
    assert correction.name == "bias correction" and correction.kept
    assert host.shifts and not host.branches
    assert report.equivalent_bits == report.equivalent_bits_before
    assert distance(host, test) < before


class Compensating(PlainHost):
    """The second layer makes up for 60 % of what rounding did to the first."""

    def __init__(self):
        torch.manual_seed(0)
        float_net = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Linear(12, 8))
        nn.init.orthogonal_(float_net[0].weight)
        super().__init__(float_net, bits=5)
        first, second = self.layers
        error = (first.weight - first.dequantized).double()
        made_up = second.weight.double() @ error @ first.dequantized.double().inverse()
        dequantized = (second.weight + 0.6 * made_up).float()
        self.layers[1] = dataclasses.replace(second, dequantized=dequantized)
        self.model[1].weight.data = dequantized


def test_a_part_is_kept_where_the_whole_does_harm():
    host, data = Compensating(), [*torch.randn(4, 32, 12)]
    ranks = {"0": 12, "1": 0}
    settings = {"metric": "svd", "adapter_bits": 32, "bias_correction": "off"}
    report = CoRa({"ranks": ranks, "budget": 0.6, **settings}).apply(host, data)
    whole, half, quarter = report.steps
    assert not whole.kept and half.kept and not quarter.kept
    assert half.name == "adapters × 0.5"
    # Of the error 0.4 was left: its share after the step is 0.6, 0.1 and 0.15.
    assert whole.after.kl > whole.before.kl > quarter.after.kl > half.after.kl
    assert report.after == half.after
    half_of_it = host.layers[0].residual.float() / 2
    x = torch.randn(9, 12)
    torch.testing.assert_close(host.branches["0"](x), x @ half_of_it.mT)


class Breaking(PlainHost):
    """Fails when it is judged with adapters in place."""

    def run(self, images):
        if self.branches:
            raise RuntimeError("out of memory")
        return super().run(images)


def test_a_failure_half_way_leaves_no_adapters():
    host = Breaking(net())
    with pytest.raises(RuntimeError, match="out of memory"):
        CoRa({"budget": 0.2}).apply(host, batches())
    assert host.branches == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"budget": "5000%"},
            r"more than there is to buy; every residual whole costs \d",
        ),
        ({"budget": 1e-6}, "buys no adapter; the cheapest costs"),
        ({"budget": 0.01, "ranks": {"4": 16}}, "pinned ranks alone cost"),
        ({"ranks": {"4": 17}}, "4: rank 17 exceeds its full rank 16"),
        ({"ranks": {"head*": 1}}, r"'head\*' fits no layer; they are 0, 2, 4, 6, 10"),
        ({"ranks": {"*": 0}}, "every layer is pinned to rank 0"),
    ],
)
def test_an_impossible_wish_is_refused_with_the_way_out(settings, message):
    host = PlainHost(net())
    with pytest.raises(CoRaError, match=message):
        CoRa(settings).apply(host, batches())
    assert host.branches == {}


def test_a_layer_with_weights_that_are_no_numbers_is_named():
    broken = net()
    broken[4].weight.data[0, 0] = float("nan")
    with pytest.raises(CoRaError, match="4: its float weight holds NaN"):
        CoRa().apply(PlainHost(broken), batches())


def test_a_layer_that_calibration_never_reaches_is_named():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.aside = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.net(x)

    report = CoRa({"budget": 0.2}).apply(PlainHost(Aside()), batches())
    assert report.skipped == {"aside": "calibration never reached it"}
    assert "aside" not in [row.name for row in report.layers]
    report = CoRa({"budget": 0.2, "ranks": {"aside": 0}}).apply(
        PlainHost(Aside()), batches()
    )
    assert report.skipped == {"aside": "rank 0 was asked for"}


def test_a_report_is_plain_values_and_reads_well(tmp_path):
    host = PlainHost(net())
    host.skipped = {"head": "transposed"}
    report = CoRa({"budget": 0.2}).apply(host, batches())
    report.to_json(tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text())
    assert read == json.loads(json.dumps(dataclasses.asdict(report)))
    assert CoRaConfig.of(read["config"]) == CoRaConfig(budget=0.2)
    text = str(report)
    for layer in host.layers:
        assert f" {layer.name} " in text
    assert "left alone: head: transposed" in text
    assert f"{report.equivalent_bits:.3f} bits a weight" in text
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.to_json(tmp_path / "nowhere" / "report.json")


def test_the_report_marks_layers_whose_own_error_was_raised():
    report = CoRa({"budget": 0.2}).apply(PlainHost(net()), batches())
    note = "higher than without the adapter"
    lowered = [
        dataclasses.replace(e, error_after=e.error_before / 2) for e in report.layers
    ]
    assert note not in str(dataclasses.replace(report, layers=tuple(lowered)))
    raised = dataclasses.replace(lowered[0], error_after=7.0, error_before=1.0)
    layers = (raised, *lowered[1:])
    text = str(dataclasses.replace(report, layers=layers))
    assert note in text and "7*" in text


def test_a_report_is_short_on_the_command_line_and_a_table_in_notebooks():
    report = CoRa({"budget": 0.2}).apply(PlainHost(net()), batches())
    assert repr(report).startswith("<Report: ") and len(repr(report)) < 150
    assert "\n" not in repr(report)
    shown = report._repr_html_()
    assert shown.startswith("<pre>") and report.layers[0].name in shown
