"""What `auto` makes of outputs, and what the report says of it."""

import math

import pytest
import torch
from plain_host import PlainHost
from torch import nn

from cora_plugin import CoRa, CoRaConfig, CoRaError
from cora_plugin.objective import KL, Bernoulli, decide

torch.manual_seed(0)
LOGITS = torch.randn(6, 10)
IMAGE = torch.randn(6, 3, 8, 8)
WIDE = torch.randn(6, 12, 5)


def auto(reference, config=None, **known):
    named = reference if isinstance(reference, dict) else {"": reference}
    return decide(CoRaConfig.of(config or {}), named, **known)


@pytest.mark.parametrize(
    ("outputs", "known", "name", "axis"),
    [
        (LOGITS, {}, "kl", 1),
        (LOGITS.softmax(1), {}, "kl", 1),
        (LOGITS[:, :1], {}, "mse", None),
        (LOGITS[:, 0], {}, "mse", None),
        (nn.functional.normalize(LOGITS), {}, "cosine", None),
        (LOGITS.sigmoid(), {}, "mse", None),
        (IMAGE, {"images": IMAGE, "channels": 3}, "mse", None),
        (IMAGE[:, :1], {}, "mse", None),
        (WIDE, {"channels": 12}, "kl", 1),
        (WIDE.mT, {"channels": 12}, "kl", 2),
        (WIDE.movedim(2, 0), {"channels": 12}, "kl", 2),
        (WIDE.relu(), {"channels": 12}, "mse", None),
        (LOGITS.relu(), {}, "mse", None),
        (8 * LOGITS.relu(), {}, "kl", 1),
    ],
)
def test_auto_decides_by_shape_and_values_and_says_so(outputs, known, name, axis):
    choice = auto(outputs, **known)
    assert choice.objective.name == name
    assert getattr(choice.objective, "axis", axis) in (axis, 1)
    assert axis is None or choice.objective.axis == axis
    assert choice.notes and not choice.doubts
    assert str(list(outputs.shape)) in choice.notes[0]


@pytest.mark.parametrize("outputs", [WIDE, IMAGE, torch.randn(2, 5, 5)])
def test_a_doubtful_class_axis_is_asked_for(outputs, caplog):
    choice = auto(outputs, channels=3 if outputs is IMAGE else 7)
    assert choice.objective.name == "mse"
    assert "objective=kl with axis=1" in caplog.text
    told = auto(outputs, {"objective": "kl", "axis": -1})
    assert told.objective == KL(-1)
    assert not told.doubts and not told.notes


def test_the_setting_that_is_asked_for_names_the_output(caplog):
    choice = auto({"masks": WIDE, "boxes": LOGITS}, channels=7)
    asked = "pass objective={'masks': 'mse', …}, or objective={'masks': {'of': 'kl', 'a"
    assert asked in caplog.text
    assert "(objective={'boxes': 'mse', …} or cosine if they are none)" in str(
        choice.notes
    )


def test_probabilities_of_yes_are_no_logits():
    sure = LOGITS[:, :1].sigmoid(), torch.full((6, 1), 0.5)
    for settings in ({"objective": "bernoulli"}, {"budget": "0.1 bernoulli"}):
        told = auto(sure[0], settings)
        assert "probabilities of yes, not logits" in told.notes[0]
        logits = auto(sure[0].logit(), settings)
        assert logits.objective == Bernoulli()
        pair = [{"": p.double()} for p in sure]
        same = [{"": p.double().logit()} for p in sure]
        torch.testing.assert_close(
            told.objective.distance(*pair), logits.objective.distance(*same)
        )
        agreement = told.objective.agreement(*pair)
        assert agreement == logits.objective.agreement(*same) < 1
    certain = {"": torch.tensor([[0.0], [1.0]], requires_grad=True)}
    distance = told.objective.distance(certain, {"": 1 - certain[""]}).sum()
    distance.backward()
    assert 20 < float(distance.detach()) < 40
    assert torch.isfinite(certain[""].grad).all()


def test_probabilities_are_no_logits():
    apart = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    for pair in (apart, tuple(p.log() for p in apart)):
        objective = auto(pair[0].repeat(2, 1), "objective=kl").objective
        found = objective.distance(*({"": p.double()} for p in pair))
        expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_outputs_are_measured_one_by_one_each_over_its_own_variance():
    big = {"boxes": 300 * torch.randn(6, 4), "scores": LOGITS}
    ids = {**big, "classes": LOGITS.argmax(1)}
    choice = auto(ids, {"objective": {"boxes": "mse", "scores": "kl"}})
    assert choice.notes == ("output 'classes' is left out",)
    weights = choice.objective.weights
    assert weights["scores"] == 1
    assert weights["boxes"] == pytest.approx(1 / float(big["boxes"].var(correction=0)))
    twice = {"boxes": {"of": "mse", "weight": 2}}
    assert auto(big, {"objective": twice}).objective.weights["boxes"] == pytest.approx(
        2 * weights["boxes"]
    )
    by_itself = auto(ids)
    assert {n: e.name for n, e in by_itself.objective.parts.items()} == {
        "boxes": "kl",
        "scores": "kl",
    }
    assert "output 'classes' is left out: [6] of torch.int64" in by_itself.notes
    by_index = auto({"0": LOGITS, "1": IMAGE}, {"objective": {0: "kl", 1: "mse"}})
    assert list(by_index.objective.parts) == ["0", "1"]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("objective=ms", "'ms' is unknown; use one of auto, kl, bernoulli, mse"),
        ({"objective": {"a": "no"}}, r"objective\.a: 'no' is unknown"),
        ({"objective": {"a": {"weights": 1}}}, r"did you mean weight\?"),
        ({"objective": {"a": {"weight": 0}}}, "0 is no weight"),
        ({"objective": {}}, "no output is named"),
        ({"objective": 3}, "3 is no objective"),
    ],
)
def test_an_impossible_objective_is_refused(config, problem):
    with pytest.raises(CoRaError, match=problem):
        CoRaConfig.of(config)


@pytest.mark.parametrize(
    ("outputs", "config", "problem"),
    [
        (LOGITS[:, :1], "objective=kl", "one channel along axis 1"),
        (LOGITS, {"objective": "kl", "axis": 2}, r"axis 2 is none .* \[6, 10\]"),
        (LOGITS, {"objective": "kl", "axis": 0}, "axis 0 is none"),
        (LOGITS[:, :1], "objective=cosine", "one number is its sign alone"),
        (LOGITS[:, 0], "objective=cosine", r"\[6\], not vectors"),
        (LOGITS[:, :1], "budget=0.1 kl", "outputs are measured by mse; ask for '… mse"),
        (LOGITS, {"objective": {"a": "kl"}}, "no output 'a'"),
        (LOGITS.argmax(1), {}, r"no output can be measured \(.*torch.int64"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused(outputs, config, problem):
    with pytest.raises(CoRaError, match=problem):
        auto(outputs, config)


@pytest.mark.parametrize(
    ("target", "name"),
    [("0.1 kl", "kl"), ("0.1 mse", "mse"), ("40 dB", "mse"), ("0.1 cosine", "cosine")],
)
def test_the_unit_of_a_target_is_a_hint(target, name):
    assert auto(WIDE, {"budget": target}).objective.name == name


class OneLogit(nn.Module):
    """A classifier of yes and no."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 16, 3, padding=1)
        self.more = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return 8 * self.head(self.more(self.body(x).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("settings", "name", "title"),
    [
        ({}, "mse", "MSE to float"),
        ({"objective": "bernoulli"}, "bernoulli", "Bernoulli KL to float"),
        ({"budget": "20 dB"}, "mse", "dB)"),
    ],
)
def test_one_channel_is_never_at_no_distance(settings, name, title):
    torch.manual_seed(1)
    data = (2 * torch.randn(48, 3, 8, 8)).split(16)
    report = CoRa({"budget": 0.4, **settings}).apply(PlainHost(OneLogit(), 2), data)
    assert report.before.objective == name
    assert 0 < report.after.value < 0.5 * report.before.value
    assert title in str(report)
    if not settings:
        assert "has one channel: squared error" in str(report)
    if "dB" in title:
        assert report.after.decibels >= 20 > report.before.decibels


def test_a_function_of_two_outputs_is_an_objective():
    def apart(y, z):
        return (y - z).abs().flatten(1).mean(1)

    data = torch.randn(48, 3, 8, 8).split(16)
    report = CoRa({"budget": 0.4, "objective": apart}).apply(
        PlainHost(OneLogit(), 2), data
    )
    assert report.after.objective == "apart"
    assert report.after.value < report.before.value
    assert report.config["objective"] == "function apart"
