"""The same fraction of its full rank for every layer (ZeroQuant-V2's LoRC)."""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

from cora_plugin.search.candidates import Candidate


def uniform(candidates: Sequence[Candidate], budget: float) -> dict[str, int]:
    """The largest fraction whose ranks, rounded down, cost at most `budget`."""

    def choice(fraction: Fraction) -> list[int]:
        # bisect: the highest rung whose rank is within the fraction of the full rank
        return [bisect_right(c.ranks, fraction * c.ranks[-1]) - 1 for c in candidates]

    def cost(fraction: Fraction) -> int:
        rungs = choice(fraction)
        return sum(c.costs[i] for c, i in zip(candidates, rungs, strict=True))

    # The cost only changes where the fraction reaches a layer's next rank; in floating
    # point, 1/49 of 49 would fall short of 1.
    reached = {Fraction(r, c.ranks[-1]) for c in candidates for r in c.ranks}
    fractions = sorted(reached | {Fraction(0)})
    held = bisect_right(fractions, budget, key=cost) - 1
    rungs = choice(fractions[held])
    return {c.name: c.ranks[i] for c, i in zip(candidates, rungs, strict=True)}
