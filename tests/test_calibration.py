import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_plugin import CoRaError
from cora_plugin.calibration import ImageSplit


def numbered(count, start=0):
    """Images whose pixels tell their number, [count, 1, 2, 2]."""
    pixels = torch.arange(start, start + count).float().view(-1, 1, 1, 1)
    return pixels.expand(-1, 1, 2, 2)


def numbers(batches):
    kept = (batch for batch in batches if batch is not None)
    return [int(n) for batch in kept for n in batch[:, 0, 0, 0].tolist()]


def stream(images, sizes):
    """Split images into batches of the given sizes, the last of which repeats."""
    while len(images):
        size = sizes[0] if len(sizes) == 1 else sizes.pop(0)
        yield images[:size]
        images = images[size:]


def walk(split, batches):
    kept = [split.keep(batch) for batch in batches]
    split.close()
    return numbers(kept)


@settings(deadline=None)
@given(
    count=st.integers(1, 60),
    share=st.floats(0.05, 0.95),
    sample=st.integers(1, 20),
    seed=st.integers(0, 99),
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=5),
)
def test_every_image_either_calibrates_or_judges(count, share, sample, seed, sizes):
    split = ImageSplit(share, sample, seed)
    kept = numbers([split.keep(batch) for batch in stream(numbered(count), sizes)])
    if split.images in (0, count):
        with pytest.raises(CoRaError, match="calibration data: "):
            split.close()
        return
    split.close()
    held = numbers(split.held_out())
    sampled = numbers(split.sample())
    assert sorted(kept + held) == list(range(count))
    assert abs(len(held) - share * count) <= 1
    assert split.images == len(kept)
    assert len(sampled) == len(set(sampled)) == min(sample, len(kept))
    assert set(sampled) <= set(kept)


def test_the_split_depends_on_the_images_and_not_on_their_batches():
    found = []
    for sizes in ([40], [1], [7], [3, 11, 2, 24]):
        split = ImageSplit(0.3, 6, seed=4)
        kept = walk(split, stream(numbered(40), sizes))
        found.append((kept, numbers(split.held_out()), numbers(split.sample())))
    assert all(each == found[0] for each in found)


def test_the_sample_is_the_same_under_a_seed_and_another_under_another():
    def drawn(seed):
        split = ImageSplit(0.2, 8, seed)
        walk(split, [numbered(200)])
        return numbers(split.sample())

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(5)}) == 5


def test_the_sample_takes_late_images_as_readily_as_early_ones():
    taken = torch.zeros(40)
    for seed in range(300):
        split = ImageSplit(0.2, 8, seed)
        walk(split, [numbered(50)])
        kept = sorted(set(range(50)) - set(numbers(split.held_out())))
        for number in numbers(split.sample()):
            taken[kept.index(number)] += 1
    # 60 each, with a deviation of 7.
    assert 35 < taken.min() and taken.max() < 90


def test_held_out_images_are_spread_evenly():
    split = ImageSplit(0.2, 4, 0)
    walk(split, [numbered(50)])
    held = torch.tensor(numbers(split.held_out()))
    assert torch.equal(held.diff(), torch.full((9,), 5))


def test_batches_are_no_larger_than_the_loader_made_them():
    split = ImageSplit(0.5, 20, 0)
    walk(split, stream(numbered(40), [6]))
    for batches in (split.held_out(), split.sample()):
        assert max(len(batch) for batch in batches) <= 6


def test_what_is_kept_does_not_change_when_the_loader_reuses_its_buffer():
    split = ImageSplit(0.5, 10, 0)
    buffer = numbered(10).clone()
    split.keep(buffer)
    held, sampled = numbers(split.held_out()), numbers(split.sample())
    buffer.zero_()
    assert numbers(split.held_out()) == held
    assert numbers(split.sample()) == sampled


@pytest.mark.parametrize("loader", [[], [torch.zeros(0, 3, 4, 4)]])
def test_an_empty_loader_is_refused(loader):
    split = ImageSplit(0.2, 4, 0)
    for item in loader:
        split.keep(item)
    with pytest.raises(CoRaError, match="calibration data: 0 images are too few"):
        split.close()


def test_too_few_images_to_hold_one_out_are_refused():
    split = ImageSplit(0.2, 4, 0)
    split.keep(numbered(4))
    with pytest.raises(CoRaError, match=r"4 images leave none .*held_out=0\.2"):
        split.close()


def test_each_seed_holds_out_other_images():
    held = []
    for seed in range(6):
        split = ImageSplit(0.2, 1, seed)
        walk(split, [numbered(100)])
        held.append(tuple(numbers(split.held_out())))
        assert len(held[-1]) in (20, 21)
        assert max(np.diff(held[-1])) <= 6
    assert len(set(held)) >= 4


def clips(batch):
    """A model whose frames come in clips of 4, each with the one behind it."""
    x = batch.flatten(1)
    pairs = x.view(-1, 4, x.shape[1])
    return {"": (pairs + pairs.roll(1, 1)).flatten(0, 1)}


def eight(batch):
    """A model with its batch size in a reshape."""
    return {"": batch.reshape(8, 4)}


@pytest.mark.parametrize(
    ("run", "whole", "join"),
    [
        (lambda x: {"": x.flatten(1)}, False, True),
        (clips, True, True),
        (lambda x: {"": clips(x)[""].view(-1, 4, 4).mean(1)}, True, True),
        (eight, True, False),
        (lambda x: {"": x.flatten(1).T}, True, True),
    ],
)
def test_batches_stay_whole_where_the_model_is_bound_to_them(run, whole, join):
    split = ImageSplit(0.25, 12, 0)
    batches = numbered(64).split(8)
    split.learn(run, batches[0])
    assert (split.whole, split.join) == (whole, join) or run is not eight
    assert split.whole == whole
    kept = walk(split, batches)
    held = split.held_out()
    if whole:
        assert {len(batch) for batch in held} == {8}
        assert numbers(held) == [*range(8), *range(32, 40)]
        assert len(split.sample(5)) == 1  # One whole batch at least.
        assert len(split.together(16)) == (16 if split.join else 8)
    assert sorted(kept + numbers(held)) == list(range(64))


def test_two_whole_batches_are_enough_and_one_is_not():
    split = ImageSplit(0.2, 4, 0)
    split.learn(eight, numbered(8))
    for start in (0, 8):
        split.keep(numbered(8, start))
    split.close()
    assert numbers(split.held_out()) == list(range(8))
    split = ImageSplit(0.2, 4, 0)
    split.learn(eight, numbered(8))
    split.keep(numbered(8))
    with pytest.raises(CoRaError, match=r"1 whole batches are too few .* two batches"):
        split.close()


def test_no_more_than_so_many_images_are_held_out():
    split = ImageSplit(0.5, 4, 0, most=10)
    kept = walk(split, stream(numbered(100), [10]))
    held = numbers(split.held_out())
    assert len(held) == 10 and len(kept) == 50
    assert not {*held} & {*kept} and max(held) > 50


def test_images_of_several_sizes_are_batched_by_size():
    split = ImageSplit(0.5, 20, 0)
    for size in (4, 6, 4, 6):
        split.keep(torch.zeros(4, 1, size, size))
    split.close()
    shapes = [tuple(batch.shape) for batch in split.held_out()]
    assert shapes == [(4, 1, 4, 4), (4, 1, 6, 6)]
    assert split.together(64).shape in ((4, 1, 4, 4), (4, 1, 6, 6))
