"""The controller of transition-rate scheduling: from observed rates to a step size.

Of "Scheduling Weight Transitions for Quantization-Aware Training" (arXiv 2404.19248,
ICCV 2025). A learning rate says how far float weights move, which says little about how
often their integer codes change; so the rate of changes is what is scheduled, and the
step size follows.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """The running rate `K` and the transition-adaptive learning rate `U`."""

    rate: float
    lr: float


@dataclass(frozen=True)
class Controller:
    """Additive control of one step size for the whole model.

    Attributes:
        momentum: `m` of the running rate.
        first: The first step size.
        eta: `η`, how far the step size moves, a unit of difference in rates. None: by
            the rate `K` that a step size `U` brings now; a step at most doubles it, and
            it stays below `LARGEST` times the first.
    """

    momentum: float
    first: float
    eta: float | None = None

    def step(self, state: State, observed: float, target: float) -> State:
        """The state after a step in which a share of all weights changed their codes.

        `K ← m K + (1 − m) k` (eq. 10), `U ← max(0, U + η (R − K))` (eq. 11).

        Args:
            state: The state before it.
            observed: `k`, the rate of this step (eq. 5).
            target: `R`, the target rate now.
        """
        rate = self.momentum * state.rate + (1 - self.momentum) * observed
        if self.eta is not None:
            return State(rate, max(0.0, state.lr + self.eta * (target - rate)))
        moved = state.lr + self._damped(state.lr, rate, target) * (target - rate)
        return State(rate, min(moved, LARGEST * self.first))

    def _damped(self, lr: float, rate: float, target: float) -> float:
        """The `η` that brings the rate to its target fast, and hardly beyond it.

        A rate in proportion to the step size, k = a U, makes of eqs. 10 and 11 a second
        order system, s² + (1 − m) s + (1 − m) η a = 0. Its damping is 1 / √2, with 4 %
        of overshoot, at η a = (1 − m) / 2.
        """
        gain = (1 - self.momentum) / 2
        least = gain * target  # Below it the step size would more than double.
        return gain * lr / max(rate, least) if rate or target else 0.0


LARGEST = 100.0
"""Of the first step size: where codes no longer change the more, it would grow on."""


def momentum_for(steps: int) -> float:
    """The momentum of the running rate: 0.99 (the paper's), less in short trainings.

    The target falls to zero in so many steps; what is averaged should be a small share
    of them.
    """
    return min(0.99, max(0.5, 1 - AVERAGED / steps))


AVERAGED = 100
"""All steps over those that the running rate averages, at least."""
