"""What a strategy chooses from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One layer's choices.

    `ranks[i]` costs `costs[i]` (in the unit of the budget) and removes `gains[i]` of
    the loss; both start with rank 0 at 0 and ascend. `gains` is empty for a strategy
    that does not look at it.
    """

    name: str
    ranks: tuple[int, ...]
    costs: tuple[int, ...]
    gains: tuple[float, ...] = ()
