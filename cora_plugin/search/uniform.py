"""The same fraction of its full rank for every layer (ZeroQuant-V2's LoRC)."""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

from cora_plugin.search.candidates import Candidate, Option


def uniform(candidates: Sequence[Candidate], budget: float) -> dict[str, Option]:
    """The largest fraction whose ranks, rounded down, cost at most `budget`.

    Raises:
        CoRaError: An option is more than a rank.
    """
    ladders = [candidate.ranks for candidate in candidates]

    def choice(fraction: Fraction) -> list[Option]:
        # bisect: the highest rung whose rank is within the fraction of the full rank
        return [
            candidate.options[bisect_right(ranks, fraction * ranks[-1]) - 1]
            for candidate, ranks in zip(candidates, ladders, strict=True)
        ]

    def cost(fraction: Fraction) -> int:
        return sum(option.cost for option in choice(fraction))

    # The cost only changes where the fraction reaches a layer's next rank; in floating
    # point, 1/49 of 49 would fall short of 1.
    reached = {Fraction(rank, ranks[-1]) for ranks in ladders for rank in ranks}
    fractions = sorted(reached | {Fraction(0)})
    largest = bisect_right(fractions, budget, key=cost) - 1
    options = choice(fractions[largest])
    return {c.name: option for c, option in zip(candidates, options, strict=True)}
