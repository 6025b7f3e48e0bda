"""Ranges of activations: which estimator is meant, and the range of least error."""

from collections.abc import Collection

import torch
from torch import Tensor

from cora_plugin.adapters.errors import ConfigError

AUTO = "auto"
"""The option's default: the estimator that suits the bit width."""

FEW_BITS = 5
"""With so many bits and fewer, a range that clips loses less than one that covers."""

LOWS, HIGHS = 25, 50
"""Candidates of each end of a range, evenly from zero to what is seen."""


def estimator(
    act_range: str, act_bits: int, known: Collection[str], few: str, many: str
) -> str:
    """The name of the estimator that an option `act_range` stands for.

    Args:
        act_range: `auto`, or one of `known`, which wins whatever the bit width.
        act_bits: Bit width of activations.
        known: The names of a host's estimators.
        few: The one for `FEW_BITS` and fewer.
        many: The one for more.

    Raises:
        ConfigError: The name is unknown.
    """
    if act_range == AUTO:
        return few if act_bits <= FEW_BITS else many
    if act_range not in known:
        names = ", ".join((AUTO, *known))
        raise ConfigError(
            ("act_range",), f"{act_range!r} is unknown; use one of {names}"
        )
    return act_range


def least_squares(
    counts: Tensor, low: float, high: float, levels: int
) -> tuple[float, float]:
    """The range whose evenly spaced levels, zero among them, are nearest to values.

    It minimizes `Σ counts (x − q(x))²` over the centres x of a histogram's bins, on a
    grid of both ends. With few levels, clipping what is rare loses less than steps wide
    enough to cover it.

    Args:
        counts: How many values are in each of the bins [bins], float64.
        low: Where the first bin begins, at most 0.
        high: Where the last bin ends, at least 0; not both are 0.
        levels: How many there are, at least 2.

    Returns:
        The lowest and the highest level.
    """
    bins = (torch.arange(len(counts)).to(counts) + 0.5) / len(counts)
    x = low + bins * (high - low)  # [bins]
    lows = _ends(low, LOWS, counts)[:, None, None]
    highs = _ends(high, HIGHS, counts)[:, None]
    step = (highs - lows) / (levels - 1)  # [lows, highs, 1]
    zero = (-lows / step).round()
    rounded = ((x / step + zero).round().clamp(0, levels - 1) - zero) * step
    error = (rounded - x).square() @ counts  # [lows, highs]
    best = int(error.argmin())
    step, zero = step.flatten()[best], zero.flatten()[best]
    return float(-zero * step), float((levels - 1 - zero) * step)


def _ends(end: float, count: int, like: Tensor) -> Tensor:
    """Candidates of one end: shares of it, itself the last; zero alone where it is."""
    if end == 0:
        return like.new_zeros(1)
    return end * torch.arange(1, count + 1).to(like) / count
