"""By how much one model is right more often than another, with a bootstrap interval.

Both judge the same images, so images are resampled with the verdicts of both (Efron and
Tibshirani 1993, "An Introduction to the Bootstrap", chapter 8). What is easy or hard
for both drops out: intervals are far narrower than those of two accuracies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
COVERAGE = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference, and the ends of its interval of 95 %."""

    value: float
    low: float
    high: float

    def __float__(self) -> float:
        return self.value

    def __format__(self, form: str) -> str:
        low, high = (format(end, form) for end in (self.low, self.high))
        return f"{format(self.value, form)} [{low}, {high}]"


def gain(right: str, before: str, seed: int = 0) -> Interval:
    """How much more often a model is right than another on the same images.

    Args:
        right: Which images it is right on, as `packed` writes them.
        before: Likewise of the other model.
        seed: Seeds the resampling.

    Raises:
        ValueError: They are of different numbers of images.
    """
    one, other = (unpacked(each).astype(np.int8) for each in (right, before))
    if len(one) != len(other):
        raise ValueError(f"{len(one)} images cannot be paired with {len(other)}")
    images = len(one)
    # An image is worse, the same or better: how often each is drawn is multinomial.
    counts = np.bincount(one - other + 1, minlength=3)  # [3]
    random = np.random.default_rng(seed)
    drawn = random.multinomial(images, counts / images, RESAMPLES)  # [R, 3]
    means = (drawn[:, 2] - drawn[:, 0]) / images
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(counts[2] - counts[0]) / images, float(low), float(high))


def packed(right: Sequence[bool]) -> str:
    """Which images a model is right on, as text: their number, and a bit an image."""
    return f"{len(right)}:{np.packbits(np.array(right, dtype=bool)).tobytes().hex()}"


def unpacked(text: str) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """What `packed` wrote, [N] of 0 and 1."""
    count, _, digits = text.partition(":")
    bits = np.frombuffer(bytes.fromhex(digits), dtype=np.uint8)
    return np.unpackbits(bits, count=int(count))
