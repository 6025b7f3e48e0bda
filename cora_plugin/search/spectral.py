"""Spend the budget where it removes most of the loss."""

import heapq
import math
from collections.abc import Sequence

from cora_plugin.search.candidates import Candidate, Option


def spectral(candidates: Sequence[Candidate], budget: float) -> dict[str, Option]:
    """Greedy allocation by gain over cost, within `budget`.

    Each layer's options are reduced to the upper concave hull of gain over cost, where
    the marginal gain only falls; greedy steps along the hulls are optimal up to the
    last step. What then is left is filled with the single options that still fit.
    """
    taken = {c.name: 0 for c in candidates}
    left = budget
    queue: list[tuple[float, str, int, int]] = []
    hulls = {c.name: _hull(c.options) for c in candidates}
    options = {c.name: c.options for c in candidates}

    def offer(name: str, step: int) -> None:
        """Queue the hull's step from `step` on."""
        if step + 1 >= len(hulls[name]):
            return
        start, end = hulls[name][step], hulls[name][step + 1]
        rate = _rate(options[name][start], options[name][end])
        heapq.heappush(queue, (-rate, name, step, end))

    for name in hulls:
        offer(name, 0)
    while queue:
        rate, name, step, end = heapq.heappop(queue)
        price = options[name][end].cost - options[name][taken[name]].cost
        if rate < 0 and price <= left:
            taken[name] = end
            left -= price
            offer(name, step + 1)
    _fill(sorted(candidates, key=lambda c: c.name), taken, left)
    return {name: options[name][index] for name, index in taken.items()}


def _rate(start: Option, end: Option) -> float:
    """Gain a unit of cost between two options."""
    price = end.cost - start.cost
    gain = end.gain - start.gain
    # A shared basis runs as one convolution: all its ranks cost the same MACs.
    return gain / price if price else math.copysign(math.inf, gain) if gain else 0.0


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the upper concave hull of (cost, gain)."""
    hull: list[int] = []
    for index, option in enumerate(options):
        # Not <=, or steps of one rate would merge into one that fits less often.
        while len(hull) > 1 and _rate(options[hull[-2]], options[hull[-1]]) < _rate(
            options[hull[-1]], option
        ):
            hull.pop()
        hull.append(index)
    return hull


def _fill(candidates: Sequence[Candidate], taken: dict[str, int], left: float) -> None:
    """Spend what the hulls' long steps could not, one best option at a time.

    Of equally good options the first is taken, so candidates come in a fixed order.
    """
    while True:
        best: tuple[float, str, int, int] | None = None
        for candidate in candidates:
            start = taken[candidate.name]
            here = candidate.options[start]
            for end in range(start + 1, len(candidate.options)):
                option = candidate.options[end]
                price = option.cost - here.cost
                if price > left:
                    break
                rate = _rate(here, option)
                if rate > 0 and (best is None or rate > best[0]):
                    best = (rate, candidate.name, end, price)
        if best is None:
            return
        _, name, end, price = best
        taken[name] = end
        left -= price
