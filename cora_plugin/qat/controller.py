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
        eta: How far the step size moves, a unit of difference in rates.
    """

    momentum: float
    eta: float

    def step(self, state: State, observed: float, target: float) -> State:
        """The state after a step in which a share of all weights changed their codes.

        `K ← m K + (1 − m) k` (eq. 10), `U ← max(0, U + η (R − K))` (eq. 11).

        Args:
            state: The state before it.
            observed: `k`, the rate of this step (eq. 5).
            target: `R`, the target rate now.
        """
        rate = self.momentum * state.rate + (1 - self.momentum) * observed
        return State(rate, max(0.0, state.lr + self.eta * (target - rate)))
