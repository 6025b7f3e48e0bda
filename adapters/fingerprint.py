"""Fingerprints of quantized weights, which tell whether an adapter fits a layer.

The same weight quantized twice by the same recipe may differ in a few integers, where
the last bit of a float rounds the other way on another machine. An adapter fits both,
but a hash would tell them apart. So a weight is projected on random signs: projections
of two weights lie as far apart as the weights do (Achlioptas 2003, "Database-friendly
random projections").
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cora_plugin.adapters.operation import Operation

PROJECTIONS = 8


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of one quantized weight, in plain values that JSON can hold.

    `steps` projects the weight, in units of each channel's largest value over
    `2^(bits−1)`; `ranges` projects log2 of the channels' largest values.
    """

    bits: float
    operation: dict[str, Any]
    steps: tuple[float, ...]
    ranges: tuple[float, ...]

    @classmethod
    def of(cls, weight: Tensor, bits: float, operation: Operation) -> "Fingerprint":
        """The fingerprint of a dequantized weight [m, n/g, *kernel] or [m, n]."""
        rows = weight.detach().cpu().double().flatten(1)  # [m, k]
        largest = rows.abs().amax(1)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        steps = rows / largest[:, None] * 2 ** (bits - 1)
        return cls(bits, asdict(operation), _project(steps), _project(largest.log2()))

    @classmethod
    def read(cls, fields: Any) -> "Fingerprint":
        """A fingerprint from the fields that JSON brought back.

        Raises:
            TypeError, ValueError: They are not those of a fingerprint.
        """
        bits, operation = float(fields["bits"]), dict(fields["operation"])
        steps, ranges = (tuple(map(float, fields[k])) for k in ("steps", "ranges"))
        numbers = (bits, *steps, *ranges)
        if {len(steps), len(ranges)} != {PROJECTIONS} or not all(
            map(math.isfinite, numbers)
        ):
            raise ValueError("its fingerprint is not one")
        return cls(bits, operation, steps, ranges)

    def difference(self, other: "Fingerprint", values: int) -> str | None:
        """The first difference from another fingerprint in words, or None.

        Args:
            other: The other fingerprint.
            values: How many values the weight has.
        """
        if self.bits != other.bits:
            return f"a weight of {self.bits:g} bits, not of {other.bits:g}"
        for field, mine in self.operation.items():
            theirs = other.operation.get(field)
            if _plain(mine) != _plain(theirs):
                return f"{field} {_plain(mine)}, not {_plain(theirs)}"
        # A hundredth: all channels of a layer of 100 larger by 0.7 %.
        if _distance(self.ranges, other.ranges) > 0.01:
            return "a weight of other scales"
        changed = _distance(self.steps, other.steps)
        if changed > max(4.0, values / 1000):
            share = min(changed / values, 1.0)
            return f"a weight whose integers are others (about {share:.1%} of them)"
        return None


def _project(values: Tensor) -> tuple[float, ...]:
    """Sums of values under random signs, which depend on their positions alone."""
    flat = values.flatten()
    # A hash of 32 bits, each a fair sign: the same ones on every machine, unlike those
    # of a random generator. The products stay below 2^63.
    mixed = torch.arange(1, len(flat) + 1)
    for factor in (0x45D9F3B, 0x45D9F3B, 1):
        mixed = (mixed ^ (mixed >> 16)) * factor & 0xFFFFFFFF
    signs = ((mixed >> bit & 1) * 2 - 1 for bit in range(PROJECTIONS))
    return tuple(round(float((flat * sign).sum()), 4) for sign in signs)


def _distance(mine: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    """Estimate of the squared distance of what was projected."""
    pairs = zip(mine, theirs, strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / PROJECTIONS


def _plain(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [_plain(e) for e in value] if isinstance(value, tuple | list) else value
