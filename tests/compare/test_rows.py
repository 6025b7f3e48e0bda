"""Rows say the same of a model whoever asks, and the table shows what is known."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from cora_plugin import CoRaConfig
from cora_plugin.compare.rows import (
    METHODS,
    SHORT,
    Row,
    judge,
    method_name,
    settings,
    show,
    table,
    top1,
)
from cora_plugin.objective import Cosine


def printed(made):
    text = io.StringIO()
    Console(file=text, width=120).print(made)
    return text.getvalue()


def test_top1_of_one_right_class_or_of_several():
    outputs = torch.eye(4)
    assert top1(outputs, torch.tensor([0, 1, 0, 0])) == 0.5
    assert top1(outputs, [(0, 3), (0, 1), (1,), ()]) == 0.5


def test_top1_wants_a_label_an_image():
    with pytest.raises(ValueError, match="shorter"):
        top1(torch.eye(4), torch.tensor([0, 1, 0]))


def test_a_row_against_the_float_network():
    reference = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    same = judge(reference, reference, torch.tensor([1, 1]), model="net", seconds=1.0)
    assert (same.kl, same.agreement, same.top1) == (0, 1, 0.5)
    assert (same.model, same.seconds) == ("net", 1.0)
    other = judge(reference, torch.zeros(2, 2))
    # Uniform outputs: KL is what the float network's entropy lacks of log 2.
    p = reference.double().softmax(1)
    entropy = float(-(p * p.log()).sum(1).mean())
    assert other.kl == pytest.approx(math.log(2) - entropy)
    assert other.agreement == 0.5 and other.top1 is None
    each = math.log(2) + (p * p.log()).sum(1)
    assert other.error == pytest.approx(float(each.std() / 2**0.5))
    assert same.error is None and judge(reference[:1], torch.zeros(1, 2)).error is None


def test_a_row_is_read_back():
    row = Row(
        model="net",
        top1=0.5,
        agreement=1.0,
        kl=0.25,
        iterations=0,
        details={"act_range": None, "steps": ["a"]},
    )
    written = json.loads(json.dumps(row.to_dict()))
    assert "recipe" not in written and written["act_range"] is None
    assert Row.of(written) == row


def test_rows_tell_what_they_gain_over_others():
    labels = torch.arange(200) % 4
    outputs = torch.nn.functional.one_hot(labels, 4).float()
    worse = outputs.clone()
    worse[:40] = worse[:40].roll(1, 1)
    one, other = (judge(outputs, each, labels) for each in (outputs, worse))
    assert other.beside(one).gain.value == pytest.approx(-0.2)
    row = one.beside(other)
    assert row.gain.value == pytest.approx(0.2)
    assert row.gain.low < 0.2 < row.gain.high
    assert Row.of(json.loads(json.dumps(row.to_dict()))) == row
    text = printed(table([other, row], {"model": "label"}))
    assert f"+20.0% [{row.gain.low:+.1%}, {row.gain.high:+.1%}]" in text
    unlabelled = judge(outputs, worse)
    assert unlabelled.beside(one) == unlabelled and one.beside(unlabelled) == one


def test_every_method_can_be_configured():
    for method in [*METHODS, *SHORT]:
        config = CoRaConfig.of({"budget": 0.1, **settings(method)})
        assert method_name(config) in METHODS
    assert CoRaConfig.of(settings("default")) == CoRaConfig()
    assert method_name(CoRaConfig()) == SHORT["default"]


def test_the_table_leaves_out_what_no_row_has():
    rows = [
        Row(label="float", top1=None, agreement=1.0, kl=0.0, seconds=0.0),
        Row(label="quantized", top1=None, agreement=0.5, kl=0.12345, iterations=0),
    ]
    text = printed(table(rows, {"model": "label"}, "title"))
    assert "title" in text and "agreement" in text
    assert not any(word in text for word in ("top-1", "bits", "iterations"))
    assert "0.1235" in text and "50.0%" in text and "0.0000" in text
    near = Row(label="near", top1=None, agreement=1.0, kl=2.45e-6)
    assert "2.4e-06" in printed(table([near], {"model": "label"}))
    labelled = [*rows, Row(top1=0.25, agreement=0.0, kl=1.0, equivalent_bits=4.5)]
    text = printed(table(labelled, {"model": "label", "adapters": "method"}))
    assert "25.0%" in text and "4.50" in text


def test_outputs_without_classes_are_judged_by_their_own_distance():
    reference = torch.tensor([[1.0], [3.0]])
    row = judge(reference, reference + 0.5, torch.tensor([0, 0]))
    assert (row.kl, row.top1, row.agreement) == (None, None, None)
    assert (row.distance, row.objective) == (0.25, "mse")
    assert Row.of(row.to_dict()) == row
    text = printed(table([row], {"model": "label"}))
    assert "distance" in text and "KL" not in text and "±" not in text
    other = judge(reference, reference + torch.tensor([[0.5], [0.6]]))
    assert other.error == pytest.approx(0.055, rel=1e-5)
    text = printed(table([other], {"model": "label"}))
    assert "±" in text and "0.055" in text
    wide = judge(reference.repeat(1, 3), reference.repeat(1, 3), objective=Cosine())
    assert wide.objective == "cosine"


def test_a_narrow_console_has_no_room_for_errors():
    row = Row(label="+ adapters", top1=0.5, agreement=0.5, kl=0.25, error=0.0123)
    for width, shown in ((50, False), (80, True)):
        text = io.StringIO()
        show(table([row], {"model": "label"}), Console(file=text, width=width))
        made, _, left_out = text.getvalue().partition("no room for")
        assert "+ adapters" in made and ("0.012" in made) is shown
        assert left_out == ("" if shown else " ±: see report.html\n")
