"""Spend the budget where it removes most of the loss."""

import heapq
import math
from collections.abc import Sequence

from cora_plugin.search.candidates import Candidate


def spectral(candidates: Sequence[Candidate], budget: float) -> dict[str, int]:
    """Greedy allocation by gain over cost, within `budget`.

    Each layer's choices are reduced to the upper concave hull of gain over cost, where
    the marginal gain only falls; greedy steps along the hulls are optimal up to the
    last step. What then is left is filled with the single rungs that still fit.
    """
    rung = {c.name: 0 for c in candidates}
    left = budget
    queue: list[tuple[float, str, int, int]] = []
    hulls = {c.name: _hull(c) for c in candidates}
    by_name = {c.name: c for c in candidates}

    def offer(name: str, step: int) -> None:
        """Queue the hull's step from `step` on."""
        if step + 1 >= len(hulls[name]):
            return
        candidate, start, end = by_name[name], hulls[name][step], hulls[name][step + 1]
        heapq.heappush(queue, (-_rate(candidate, start, end), name, step, end))

    for name in hulls:
        offer(name, 0)
    while queue:
        rate, name, step, end = heapq.heappop(queue)
        price = by_name[name].costs[end] - by_name[name].costs[rung[name]]
        if rate < 0 and price <= left:
            rung[name] = end
            left -= price
            offer(name, step + 1)
    _fill(sorted(candidates, key=lambda c: c.name), rung, left)
    return {c.name: c.ranks[rung[c.name]] for c in candidates}


def _rate(candidate: Candidate, start: int, end: int) -> float:
    """Gain a unit of cost between two rungs."""
    price = candidate.costs[end] - candidate.costs[start]
    gain = candidate.gains[end] - candidate.gains[start]
    # A shared basis runs as one convolution: all its ranks cost the same MACs.
    return gain / price if price else math.copysign(math.inf, gain) if gain else 0.0


def _hull(candidate: Candidate) -> list[int]:
    """Rungs on the upper concave hull of (cost, gain)."""
    hull: list[int] = []
    for index in range(len(candidate.ranks)):
        # Not <=, or steps of one rate would merge into one that fits less often.
        while len(hull) > 1 and _rate(candidate, hull[-2], hull[-1]) < _rate(
            candidate, hull[-1], index
        ):
            hull.pop()
        hull.append(index)
    return hull


def _fill(candidates: Sequence[Candidate], rung: dict[str, int], left: float) -> None:
    """Spend what the hulls' long steps could not, one best rung at a time.

    Of equally good rungs the first is taken, so candidates come in a fixed order.
    """
    while True:
        best: tuple[float, str, int, int] | None = None
        for candidate in candidates:
            start = rung[candidate.name]
            for end in range(start + 1, len(candidate.ranks)):
                price = candidate.costs[end] - candidate.costs[start]
                if price > left:
                    break
                rate = _rate(candidate, start, end)
                if rate > 0 and (best is None or rate > best[0]):
                    best = (rate, candidate.name, end, price)
        if best is None:
            return
        _, name, end, price = best
        rung[name] = end
        left -= price
