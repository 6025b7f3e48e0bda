"""Bit widths and adapters planned together, on the plain host."""

import itertools
from dataclasses import replace

import pytest
import torch
from plain_host import PlainHost, quantized_copy
from small_net import batches, distance, net

from cora_plugin import CoRa, CoRaError
from cora_plugin.adapters.errors import ConfigError
from cora_plugin.adapters.quantized import quantize
from cora_plugin.budget import stored_bits
from cora_plugin.compare.html import Page, html
from cora_plugin.config import Budget, CoRaConfig
from cora_plugin.width_plan import WidthPlan
from cora_plugin.widths import plan_widths

MENU = (2, 3, 4, 6, 8)


def at(plan, float_net):
    """A net quantized anew at a plan's widths."""
    model = quantized_copy(float_net, 3)
    for name, layer in model.named_modules():
        if name in plan.layer_bits:
            bits = plan.layer_bits[name]
            weight = layer.plain.weight
            layer.weight.data = quantize(weight, bits).dequantize().to(weight)
            layer.plain.bits = bits
    return PlainHost(model)


class Counted:
    """Counts a host's runs."""

    def __init__(self, host):
        self.host, self.plain, self.runs = host, host.run, 0

    def __enter__(self):
        self.host.run = self
        return self

    def __call__(self, batch):
        self.runs += 1
        return self.plain(batch)

    def __exit__(self, *_):
        self.host.run = self.plain


def planned(budget, **settings):
    host = PlainHost(net())
    config = {"budget": budget, "menu": MENU, **settings}
    return host, plan_widths(host, batches(), config)


@pytest.mark.parametrize("times", [0.9, 1.0, 1.3])
def test_a_plan_holds_its_budget_and_is_better_than_adapters_alone(times):
    host, plan = planned(f"{times} ptq")
    before = distance(host, batches(1, seed=9)[0])
    stored = stored_bits(host.layers, ())
    allowed = times * stored
    again = at(plan, net())
    config = {"budget": f"{times} ptq", "menu": MENU}
    report = CoRa(config).apply(again, batches(), plan)
    weights = sum(layer.weight.numel() for layer in host.layers)
    assert report.equivalent_bits * weights <= allowed * (1 + 1e-9)
    assert report.equivalent_bits == pytest.approx(plan.bits)
    after = distance(again, batches(1, seed=9)[0])
    assert after < before
    if times > 1:
        alone = PlainHost(net())
        CoRa({"budget": f"{times} ptq"}).apply(alone, batches())
        assert after < distance(alone, batches(1, seed=9)[0])


def test_the_report_tells_widths_and_what_was_tried():
    _, plan = planned("1.0 ptq")
    assert 0 < plan.next_tenth < 1
    report = CoRa({"budget": "1.0 ptq", "menu": MENU}).apply(
        at(plan, net()), batches(), plan
    )
    widths = {row.name: row.weight_bits for row in report.layers}
    assert widths == plan.widths
    text = " ".join(str(report).split())
    assert "tried 2/3/4/6/8 with adapters: KL" in text
    tried = [line for line in str(report).splitlines() if line.startswith("tried ")]
    assert len(set(tried)) == len(tried)
    assert f"would take {plan.next_tenth:.0%} of the predicted error" in text
    trials = report.to_dict()["plan"]["trials"]
    values = [trial["value"] for trial in trials]
    assert values == sorted(values) and len(values) == len(plan.trials)
    # The same plan is told once of a menu, whether or not rounding was counted.
    kinds = [(t["menu"], t["adapters"], t["value"], t["bits"]) for t in trials]
    assert all(kinds.count(kind) == 1 for kind in kinds)


def test_the_best_of_what_was_tried_is_the_plan():
    _, plan = planned("1.0 ptq")
    values = [trial.distance.value for trial in plan.trials]
    assert values == sorted(values)
    assert plan.bits == plan.trials[0].bits <= plan.allowed * (1 + 1e-9)
    # The host's own widths without adapters are always among them.
    assert any(trial.menu == () and not trial.adapters for trial in plan.trials)
    assert any(trial.menu == MENU and trial.adapters for trial in plan.trials)


def test_kinds_of_plans_are_compared_behind_the_regression():
    _, plan = planned("1.2 ptq")
    tried = [trial for trial in plan.trials if trial.regressed]
    assert {bool(trial.menu) for trial in tried} == {True, False}
    assert all(trial.adapters for trial in tried)
    config = {"budget": "1.2 ptq", "menu": MENU}
    report = CoRa(config).apply(at(plan, net()), batches(), plan)
    assert report.after.value <= plan.trials[0].distance.value * 1.02
    assert "with adapters and their regression" in " ".join(str(report).split())
    _, without = planned("1.2 ptq", regression=False)
    assert not any(trial.regressed for trial in without.trials)


def test_more_budget_leaves_less_error():
    found = [planned(f"{times} ptq")[1] for times in (0.8, 1.0, 1.2, 1.5)]
    left = [
        next(t.predicted for t in plan.trials if t.menu == MENU and t.adapters)
        for plan in found
    ]
    assert all(more > less for more, less in itertools.pairwise(left))


def test_the_model_is_as_it_was():
    host = PlainHost(net())
    before = {k: v.clone() for k, v in host.model.state_dict().items()}
    plan_widths(host, batches(), {"budget": "1.1 ptq", "menu": MENU})
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not host.branches and not host.shifts


def test_ranks_are_pinned_as_without_a_menu():
    _, plan = planned("1.2 ptq", ranks={"*": 0})
    assert not any(each.forms for each in plan.treatments.values())
    report = CoRa({"budget": "1.2 ptq", "ranks": {"*": 0}}).apply(
        at(plan, net()), batches(), plan
    )
    assert report.adapter_parameters == 0
    assert report.after.value < plan.trials[-1].distance.value


def test_pinned_ranks_are_not_given_up_where_a_total_leaves_nothing():
    settings = {"budget": "1.0 ptq", "ranks": {"*": 1}}
    with pytest.raises(CoRaError, match=r"^budget: 1\.0 ptq leaves nothing for"):
        CoRa(settings).apply(PlainHost(net()), batches())


def test_a_plan_that_is_none():
    with pytest.raises(CoRaError, match=r"^plan: a dict is no plan"):
        CoRa().apply(PlainHost(net()), batches(), {"0": 4})


def test_pinned_widths_stay():
    host = PlainHost(net())
    name = host.layers[0].name
    config = {"budget": "1.3 ptq", "menu": MENU}
    free = plan_widths(host, batches(), config)
    assert free.widths[name] != 3
    fixed = plan_widths(host, batches(), config, {name: 3})
    assert fixed.widths[name] == 3 and name not in fixed.layer_bits


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_layers_get_the_widths_that_they_are_pinned_at(bits):
    host, config = PlainHost(net()), {"budget": "1.4 ptq", "menu": MENU}
    name = host.layers[0].name
    plan = plan_widths(host, batches(), config, {name: bits})
    assert plan.widths[name] == plan.layer_bits[name] == bits
    report = CoRa(config).apply(at(plan, net()), batches(), plan)
    assert report.equivalent_bits <= plan.allowed * (1 + 1e-9)


def test_a_layer_pinned_at_its_own_width_is_not_quantized_at_others():
    host, config = PlainHost(net()), {"budget": "1.2 ptq", "menu": MENU}
    name = host.layers[0].name
    quantized = host.quantize

    def quantize_others(weights, bits=None):
        assert name not in weights
        return quantized(weights, bits)

    host.quantize = quantize_others
    assert plan_widths(host, batches(), config, {name: 3}).widths[name] == 3


@pytest.mark.parametrize(
    ("pinned", "message"),
    [
        ({"nowhere": 4}, "^pinned: 'nowhere' fits no layer"),
        ({"*": 9}, "^pinned\\.[^:]*: 9 is out of range; use 2 or more and at most 8"),
        ({"*": "4"}, "^pinned\\.[^:]*: .4. is not"),
    ],
)
def test_pins_that_cannot_be(pinned, message):
    config = {"budget": "1.2 ptq", "menu": MENU}
    with pytest.raises(CoRaError, match=message):
        plan_widths(PlainHost(net()), batches(), config, pinned)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("4 bits total", 4.0), ("1.25 ptq", None), ("0.002 MiB", None)],
)
def test_totals_count_everything_that_is_stored(text, bits):
    host, plan = planned(text)
    weights = sum(layer.weight.numel() for layer in host.layers)
    stored = stored_bits(host.layers, ()) / weights
    expected = {
        "1.25 ptq": 1.25 * stored,
        "0.002 MiB": 0.002 * 2**23 / weights,
    }.get(text, bits)
    assert plan.allowed == pytest.approx(expected)
    assert plan.bits <= expected * (1 + 1e-9)


def test_a_total_without_a_menu_buys_adapters_for_what_is_left():
    host = PlainHost(net())
    stored = stored_bits(host.layers, ())
    report = CoRa({"budget": "1.3 ptq"}).apply(host, batches())
    assert 0 < report.budget_used <= 0.3 * stored
    report = CoRa({"budget": "1.0 ptq"}).apply(PlainHost(net()), batches())
    assert report.adapter_parameters == 0
    assert report.after.value <= report.before.value


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"budget": "0.1 ptq", "menu": MENU}, r"the least that the menu .* stores is"),
        ({"budget": "0.05", "menu": MENU}, r"is no total; bit widths are planned"),
        ({"budget": "1 ptq", "menu": (1, 4)}, r"^menu\.0: 1 is out of range"),
    ],
)
def test_impossible_plans(config, message):
    with pytest.raises(CoRaError, match=message):
        plan_widths(PlainHost(net()), batches(), config)


@pytest.mark.parametrize("other", [{}, {"budget": "5%"}, {"sweep": [0.1, 0.2]}])
def test_a_menu_needs_a_total_from_the_first(other):
    with pytest.raises(ConfigError, match=r"^budget: .* is no total; bit widths are"):
        CoRaConfig(menu=MENU, **other)


def test_a_menu_without_a_plan_is_refused():
    host = PlainHost(net())
    with pytest.raises(CoRaError, match=r"^menu: bit widths are chosen before"):
        CoRa({"budget": "1 ptq", "menu": MENU}).apply(host, batches())
    with pytest.raises(CoRaError, match=r"budget: 0.5 ptq is .* alone store"):
        CoRa({"budget": "0.5 ptq"}).apply(host, batches())
    assert not host.branches


def test_a_plan_for_other_widths_is_refused():
    host, plan = planned("0.9 ptq")
    with pytest.raises(CoRaError, match=r"planned at .* quantize the float model anew"):
        CoRa({"budget": "1 ptq"}).apply(host, batches(), plan)
    other = replace(plan, widths={**plan.widths, "another": 4.0})
    with pytest.raises(CoRaError, match=r"another: planned at 4.0 bits"):
        CoRa({"budget": "1 ptq"}).apply(at(plan, net()), batches(), other)
    assert isinstance(plan, WidthPlan) and not host.branches


def test_statistics_that_are_kept_serve_the_adapters():
    config = {"budget": "1.2 ptq", "menu": MENU}
    plan = plan_widths(PlainHost(net()), batches(), config, keep=True)
    reports, passes = [], []
    for given in (plan, replace(plan, collected=None)):
        host = at(plan, net())
        with Counted(host) as seen:
            reports.append(CoRa(config).apply(host, batches(), given))
        passes.append(seen.runs)
    kept, fresh = reports
    # A batch each of the moments, and the backward passes.
    assert passes[0] < passes[1] - len(batches())
    assert kept.after.value == pytest.approx(fresh.after.value, rel=1e-3)
    assert (kept.images, kept.held_out) == (fresh.images, fresh.held_out)


def test_a_plan_for_another_float_model_is_refused():
    _, plan = planned("1.2 ptq")
    other = net()
    with torch.no_grad():
        for name, layer in other.named_modules():
            if name in plan.widths:
                layer.weight.data = layer.weight.data + 0.05 * torch.sign(layer.weight)
    host = at(plan, other)
    with pytest.raises(CoRaError, match=r"planned for a weight .* plan_bits again"):
        CoRa({"budget": "1.2 ptq"}).apply(host, batches(), plan)
    assert not host.branches
    # The last bit of a float is none of its business.
    with torch.no_grad():
        for layer in (same := net()).modules():
            if hasattr(layer, "weight"):
                layer.weight.data = layer.weight.data * (1 + 1e-7)
    CoRa({"budget": "1.2 ptq"}).apply(at(plan, same), batches(), plan)


def test_the_curve_falls_and_goes_through_the_plan():
    _, plan = planned("1.0 ptq")
    bits, left = zip(*plan.curve, strict=True)
    assert len(plan.curve) > 5
    assert list(bits) == sorted(bits) and list(left) == sorted(left, reverse=True)
    assert any(
        at == plan.bits and error == pytest.approx(plan.trials[0].predicted)
        for at, error in plan.curve
    )


def test_a_plan_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    _, plan = planned("1.0 ptq")
    config = {"budget": "1.0 ptq", "menu": MENU}
    report = CoRa(config).apply(at(plan, net()), batches(), plan)
    report.plot_plan(tmp_path / "widths.png")
    assert (tmp_path / "widths.png").stat().st_size > 10_000
    plain = CoRa(0.1).apply(PlainHost(net()), batches())
    with pytest.raises(CoRaError, match="no plan to draw"):
        plain.plot_plan(tmp_path / "widths.png")
    text = html(Page(title="run", rows=[], names={}, layers={"a": report, "b": report}))
    assert "Bit widths, best first" in text
    assert text.count('<tr id="trial-0-0">') == text.count('<tr id="trial-1-0">') == 1
    assert 'href="#trial-1-0"' in text and "predicts at other budgets" in text


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("4.1 bits total", 4.1, "bits total"),
        ("1.05ptq", 1.05, "ptq"),
        ("0.8MiB", 0.8, "MiB"),
        ("105% ptq", 1.05, "ptq"),
    ],
)
def test_totals_are_read_and_written(text, amount, unit):
    budget = Budget.parse(text)
    assert budget == Budget(amount, unit) and budget.is_total
    assert Budget.parse(str(budget)) == budget
