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
    return [int(n) for batch in batches for n in batch[:, 0, 0, 0].tolist()]


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


def test_images_come_alone_or_first_in_a_tuple_or_list():
    images, targets = numbered(10), torch.zeros(10)
    for item in (images, (images,), (images, targets), [images, targets, "paths"]):
        kept = ImageSplit(0.2, 4, 0).keep(item)
        assert torch.equal(kept, images[torch.arange(10) % 5 != 4])


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


@pytest.mark.parametrize(
    "item",
    [
        None,
        3,
        "photo.jpg",
        {"images": torch.zeros(2, 3, 4, 4)},
        np.zeros((2, 3, 4, 4)),
        [],
        (),
        ("photo.jpg", torch.zeros(2)),
        [[torch.zeros(2, 3, 4, 4)]],
        torch.tensor(3.0),
        torch.zeros(4),
    ],
)
def test_an_item_that_holds_no_images_is_refused_by_its_number(item):
    split = ImageSplit(0.2, 4, 0)
    split.keep(numbered(3))
    with pytest.raises(CoRaError, match=r"item 1 is .* images \[N, …\]"):
        split.keep(item)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_that_are_not_float_are_refused(dtype):
    with pytest.raises(CoRaError, match="item 0 has dtype"):
        ImageSplit(0.2, 4, 0).keep(torch.zeros(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("value", ["NaN", "inf", "-inf"])
def test_images_that_are_not_finite_are_refused_by_their_number(value):
    split = ImageSplit(0.2, 4, 0)
    split.keep(numbered(3))
    images = numbered(3).clone()
    images[2, 0, 1, 1] = float(value)
    with pytest.raises(CoRaError, match=f"item 1 holds {value.lstrip('-')}"):
        split.keep((images, None))


def test_images_of_another_shape_than_those_before_are_refused():
    split = ImageSplit(0.2, 4, 0)
    split.keep(torch.zeros(2, 3, 8, 8))
    with pytest.raises(CoRaError, match=r"item 1 .*\[3, 4, 4\].*\[3, 8, 8\]"):
        split.keep(torch.zeros(2, 3, 4, 4))


def test_each_seed_holds_out_other_images():
    held = []
    for seed in range(6):
        split = ImageSplit(0.2, 1, seed)
        walk(split, [numbered(100)])
        held.append(tuple(numbers(split.held_out())))
        assert len(held[-1]) in (20, 21)
        assert max(np.diff(held[-1])) <= 6
    assert len(set(held)) >= 4
