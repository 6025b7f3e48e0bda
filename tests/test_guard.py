"""Steps are judged by paired differences, whose standard error is told."""

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, net

from cora_plugin import CoRa
from cora_plugin.guard import Guard, Step
from cora_plugin.layer import Correction
from cora_plugin.objective import KL, Distance, distances, standard_error


def test_the_standard_error_on_hand_made_numbers():
    differences = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    expected = (14 / 3 / 4) ** 0.5  # variance 14/3 of 4 samples
    assert standard_error(differences) == pytest.approx(expected)
    assert standard_error(differences[:1]) is None
    assert standard_error(torch.tensor([1.0, torch.inf])) is None


def test_a_step_tells_its_difference_with_the_error_of_pairs():
    host, data = PlainHost(net()), batches()
    config = {"budget": 0.3, "metric": "svd", "bias_correction": "off"}
    report = CoRa(config).apply(host, data)
    (step,) = report.steps
    assert step.images == report.held_out
    held_out = torch.stack([x for i, x in enumerate(torch.cat(data)) if i % 5 == 4])
    with torch.no_grad():
        reference = {"": host.float_net(held_out)}
        after = distances(KL(), reference, host.run(held_out))
        with host.acting():
            before = distances(KL(), reference, host.run(held_out))
    pairs = after - before
    assert step.difference == pytest.approx(float(pairs.mean()), rel=1e-4)
    assert step.error == pytest.approx(float(pairs.std() / len(pairs) ** 0.5), rel=1e-4)
    assert f"({step.difference:+.2g} ± {step.error:.1g} on 19)" in str(report)


def judged(pairs, doubt):
    some = Distance(1.0, None)
    return Step.of("a step", some, some, torch.tensor(pairs).double(), doubt)


def test_the_benefit_of_the_doubt_is_in_standard_errors():
    pairs = [0.0, 0.0, 0.0, 4.0]  # mean 1, variance 4, standard error 1
    assert judged(pairs, 1).kept and judged(pairs, 1).error == 1
    assert not judged(pairs, 0.99).kept
    assert not judged(pairs, 0).kept
    better = [-pair for pair in pairs]
    assert judged(better, 0).kept and judged(better, -0.99).kept
    assert not judged(better, -1).kept


def test_a_step_may_have_to_take_a_share_of_the_distance_away():
    some = Distance(2.0, None)
    for gain, kept in ((0.39, False), (0.41, True)):
        pairs = torch.full((4,), -gain).double()
        assert Step.of("a step", some, some, pairs, -1, least=0.2).kept == kept


def test_without_an_error_the_mean_decides_and_a_tie_is_enough_in_doubt():
    for doubt in (1, 0, -1):
        assert judged([-0.1], doubt).kept
        assert not judged([0.1], doubt).kept
        assert judged([0.0, 0.0], doubt).kept == (doubt > 0)


def test_outputs_that_are_not_finite_are_compared_by_their_means():
    near, far = Distance(1.0, None), Distance(float("inf"), None)
    pairs = torch.tensor([float("nan"), 0.5])
    for doubt in (1, 0):
        assert Step.of("a", far, near, pairs, doubt).kept
        assert not Step.of("a", near, far, pairs, doubt).kept
    assert Step.of("a", far, far, pairs, 1).difference == 0


def test_chance_takes_a_harmless_step_back_as_often_as_stated():
    random = torch.Generator().manual_seed(0)
    trials = torch.randn(4000, 32, generator=random, dtype=torch.float64)
    some = Distance(1.0, None)
    kept = sum(Step.of("a", some, some, pairs, 1).kept for pairs in trials) / 4000
    assert kept == pytest.approx(0.84, abs=0.02)  # one standard error, one-sided


def each(host, images, correction):
    """Distance of each image with a correction."""
    with torch.no_grad():
        host.correct(Correction())
        reference = {"": host.float_net(images)}
        host.correct(correction)
        return distances(KL(), reference, host.run(images))


def test_images_in_reserve_judge_what_is_in_doubt():
    host, data = PlainHost(net(), bits=2), torch.cat(batches())
    layer = host.layers[-1]
    # Adds to one class what helps some images and harms others.
    shift = Correction(shifts={layer.name: 1e-3 * torch.eye(len(layer.weight))[0]})
    pairs = each(host, data, shift) - each(host, data, Correction())
    order = pairs.argsort()
    spread = order[[0, -1]]
    worse = float(pairs[spread].mean()) > 0
    for few, doubt, doubtful in (
        (order[:2], 0.0, False),
        (spread, 1.0, worse),
        (spread, 0.0, not worse),
    ):
        host.correct(Correction())
        rest = data[order[2:-1]].split(16)
        guard = Guard(host, (data[few],), KL(), rest)
        kept = guard.step("a shift", shift, doubt)
        (step,) = guard.steps
        judged_by = torch.cat([few, order[2:-1]]) if doubtful else few
        assert step.images == len(judged_by)
        expected = float(pairs[judged_by].mean())
        assert step.difference == pytest.approx(expected, rel=1e-3)
        assert kept == (expected < doubt * step.error) == bool(host.shifts)
