"""Budgets that say what to reach, and sweeps over several."""

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, net

from cora_plugin import CoRa, CoRaConfig, CoRaError
from cora_plugin.objective import KL, measure
from cora_plugin.outputs import only


@pytest.mark.parametrize("search", ["uniform", "spectral"])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_smallest_budget_that_reaches_a_divergence(search, share):
    start = CoRa({"search": search}).apply(PlainHost(net()), batches()).before.kl
    target = share * start
    config = {"search": search, "bias_correction": "off"}
    report = CoRa({**config, "budget": f"{target} kl"}).apply(
        PlainHost(net()), batches()
    )
    assert report.after.kl <= target
    assert report.budget_unit == "bits"
    # It is the cheapest that did of those tried, and one 3 % cheaper did not.
    tried = {float(p.budget.split()[0]): p for p in report.sweep}
    reached = {b: p for b, p in tried.items() if p.kl <= target}
    assert report.equivalent_bits == reached[min(reached)].equivalent_bits
    assert all(p.kl > target for b, p in tried.items() if b < min(reached))
    # (Where none is tried that is cheaper, a cheaper one buys no adapter.)
    missed = [b for b in tried if b < min(reached)]
    assert not missed or max(missed) > min(reached) / 1.04


def test_an_agreement_is_a_target_too():
    report = CoRa({"budget": "95% agreement"}).apply(PlainHost(net()), batches())
    assert report.after.agreement >= 0.95


def test_a_target_that_is_reached_already_costs_nothing():
    report = CoRa({"budget": "100 kl"}).apply(PlainHost(net()), batches())
    assert report.adapter_parameters == 0
    assert report.equivalent_bits == report.equivalent_bits_before


def test_a_target_out_of_reach_is_an_error_and_the_model_as_it_was():
    class Distorted(PlainHost):
        """Loses what no adapter brings back."""

        def run(self, images):
            return super().run(images if self.is_float else images.sign())

    host, images = Distorted(net()), batches(1)[0]
    before = only(host.run(images))
    with pytest.raises(CoRaError, match=r"1e-07 kl is out of reach: every residual"):
        CoRa({"budget": "1e-7 kl"}).apply(host, batches())
    assert torch.equal(only(host.run(images)), before)


def test_a_sweep_measures_each_budget_as_it_would_be_alone():
    plain = {"metric": "qera-exact", "bias_correction": "off"}
    config = CoRaConfig(budget=0.1, sweep=(0.05, 0.1, 0.3), **plain)
    host = PlainHost(net())
    report = CoRa(config).apply(host, batches())
    assert [p.budget for p in report.sweep] == [
        "0.05 params",
        "0.1 params",
        "0.3 params",
    ]
    same = report.sweep[1]
    assert same.equivalent_bits == report.equivalent_bits
    assert same.parameters == report.adapter_parameters
    assert same.kl == pytest.approx(report.after.kl, rel=1e-4)
    alone = CoRa({"budget": 0.3, **plain}).apply(PlainHost(net()), batches())
    assert report.sweep[2].kl == pytest.approx(alone.after.kl, rel=1e-4)
    assert "with 0.3 params:" in str(report)
    images = batches(1, seed=9)[0]
    with torch.no_grad():
        found = measure(KL(), {"": host.float_net(images)}, host.run(images))
    assert found.kl < report.before.kl


@pytest.mark.parametrize("key", ["sweep", "budget"])
def test_a_search_that_learns_is_not_repeated(key):
    value = {"sweep": [0.1, 0.2], "budget": "0.1 kl"}[key]
    with pytest.raises(CoRaError, match=r"butterworth learns .*search=spectral"):
        CoRaConfig.of({"search": "butterworth", key: value})


@pytest.mark.parametrize(
    ("text", "amounts"), [("0.02/0.05", (0.02, 0.05)), ("0.1", (0.1,))]
)
def test_a_sweep_is_read_from_a_flag(text, amounts):
    assert CoRaConfig.of(f"budget=0.05,sweep={text}").sweep == amounts


def test_a_sweep_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report = CoRa({"budget": 0.1, "sweep": [0.05, 0.3]}).apply(
        PlainHost(net()), batches()
    )
    path = tmp_path / "sweep.png"
    report.plot_sweep(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CoRaError, match="'txt' is no picture format"):
        report.plot_sweep(tmp_path / "sweep.txt")
    plain = CoRa(0.1).apply(PlainHost(net()), batches())
    with pytest.raises(CoRaError, match="no sweep to draw"):
        plain.plot_sweep(path)
