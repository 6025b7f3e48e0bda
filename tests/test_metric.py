"""Measures of the user's own, and labels, judge steps beside the distance."""

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, net
from torch import nn

from cora_plugin import CoRa, CoRaError
from cora_plugin.guard import Step
from cora_plugin.labels import Labelled, labels_of
from cora_plugin.objective import Distance


def test_a_step_that_lowers_the_users_own_measure_is_undone(caplog):
    host, left = PlainHost(net()), iter([5.0, 4.0])
    report = CoRa("budget=0.2,metric=svd,bias_correction=off").apply(
        host, batches(), metric=lambda: next(left, 5.0)
    )
    first = report.steps[0]
    assert first.difference < 0 and not first.kept and first.metric == (5.0, 4.0)
    assert "metric 5 -> 4, rolled back" in " ".join(str(report).split())
    assert "distance went from 5 to 4, while KL" in caplog.text
    assert "it took the model from" not in caplog.text
    assert all(step.metric is None for step in report.steps if step.difference > 0)


def test_a_measure_that_stays_lets_the_distance_decide():
    report = CoRa("budget=0.2").apply(PlainHost(net()), batches(), metric=lambda: 1)
    assert report.steps[0].kept and report.steps[0].metric == (1.0, 1.0)


@pytest.mark.parametrize("value", [None, "good", float("nan")])
def test_a_measure_that_is_no_number_is_refused(value):
    with pytest.raises(CoRaError, match="metric_fn: the function gave"):
        CoRa().apply(PlainHost(net()), batches(), metric=lambda: value)


class Latent(nn.Module):
    """Right where its weights are rounded to signs, as after training so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return 5 * self.head(self.body(x.flatten(1)).relu())


def labelled(host):
    torch.manual_seed(1)
    data = torch.randn(128, 6, 1)
    with torch.no_grad():
        labels = host.run(data)[""].argmax(1)
    return list(zip(data.split(16), labels.split(16), strict=True))


def test_float_weights_that_are_worse_than_the_quantized_model_are_no_reference(caplog):
    host = PlainHost(Latent(), bits=2)
    loader = labelled(host)
    report = CoRa("budget=0.9").apply(host, loader)
    assert "is right on 100% of 128 labelled images" in report.notes[-1]
    assert "no reference" in caplog.text
    with torch.no_grad():
        right = [(host.run(x)[""].argmax(1) == y).float().mean() for x, y in loader]
    assert torch.stack(right).mean() == 1
    assert not any(step.kept for step in report.steps)


def test_a_rise_within_chance_proves_nothing_to_labels():
    before = torch.arange(128) % 4 > 0
    luck, clear = before.clone(), before.clone()
    luck[:8], clear[:64] = True, True  # two more and 16 more
    distance = Distance(1.0, None, "kl")
    pairs = -torch.ones(16)
    step = Step.of("adapters", distance, distance, pairs)
    measured = [
        step.measured(before.double(), after.double(), strict=True).kept
        for after in (before, luck, clear)
    ]
    assert measured == [False, False, True]
    assert step.measured(before.double(), luck.double(), strict=False).kept


def test_labels_that_the_float_weights_know_better_judge_nothing():
    host = PlainHost(Latent(), bits=2)
    data = torch.cat([x for x, _ in labelled(host)])
    with torch.no_grad():
        labels = host.float_net(data).argmax(1)
    report = CoRa("budget=0.9").apply(
        host, list(zip(data.split(16), labels.split(16), strict=True))
    )
    assert all(step.metric is None for step in report.steps)


def test_labels_that_a_loader_has_made_up_judge_nothing():
    host = PlainHost(Latent(), bits=2)
    loader = [(x, torch.zeros_like(y)) for x, y in labelled(host)]
    host.layers[1].weight[0] -= 1  # The float model is never right about them.
    report = CoRa("budget=0.9").apply(host, loader)
    assert all(step.metric is None for step in report.steps)


def test_only_whole_numbers_a_row_are_labels():
    x = torch.zeros(4, 3)
    labels = torch.arange(4)
    assert labels_of((x, labels), x) is labels
    for other in (labels.float(), labels[:3], labels[:, None], labels > 1, None):
        assert labels_of((x, other), x) is None
    assert labels_of(x, x) is None
    assert Labelled(None).doubt is None
