"""Intervals hold what they are for as often as they say."""

import numpy as np
import pytest

from cora_plugin.compare.interval import gain, packed, unpacked


def verdicts(random, images, better=0.15, worse=0.1):
    """Of two models, of which the second is right on half and the first on more."""
    before = random.random(images) < 0.5
    change = random.random(images)
    right = before.copy()
    right[~before & (change < 2 * better)] = True
    right[before & (change < 2 * worse)] = False
    return packed(right), packed(before)


def test_what_is_packed_is_unpacked():
    for right in ([True], [False] * 9, [True, False, True] * 11):
        assert unpacked(packed(right)).astype(bool).tolist() == right


def test_intervals_cover_the_true_difference():
    random = np.random.default_rng(0)
    found = [gain(*verdicts(random, 400)) for _ in range(400)]
    covered = np.mean([each.low <= 0.05 <= each.high for each in found])
    assert 0.92 < covered < 0.98
    # As wide as the differences' own spread says: sqrt(0.25 − 0.05²) / sqrt(400).
    width = np.mean([each.high - each.low for each in found])
    assert width == pytest.approx(2 * 1.96 * (0.25 - 0.0025) ** 0.5 / 20, rel=0.05)


def test_the_same_seed_gives_the_same_interval():
    pair = verdicts(np.random.default_rng(1), 10_007)
    assert gain(*pair) == gain(*pair) != gain(*pair, seed=1)


def test_equal_models_differ_in_nothing():
    right = packed([True, False, True])
    found = gain(right, right)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert f"{found:+.1%}" == "+0.0% [+0.0%, +0.0%]"


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="3 images cannot be paired with 2"):
        gain(packed([True] * 3), packed([True] * 2))
