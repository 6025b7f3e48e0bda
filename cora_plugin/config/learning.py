"""Settings of what learns: a search, and a refinement."""

import math
import os
from dataclasses import dataclass
from typing import Any

from cora_plugin.config.checks import check, choice, known, number, whole

SCOPES = ("model", "layer")
ZERO_OR_MORE = ("gamma", "adapter_lr")


@dataclass(frozen=True)
class ButterworthConfig:
    """How the `butterworth` search learns its cutoffs.

    Args:
        order: Order of the kernel; the higher, the steeper it falls at the cutoff.
        gamma: Weight of the penalty on what the cutoffs cost beyond the budget.
        temperature: Softens the outputs that are compared.
        lr: Learning rate of Adam.
        initial_cutoff: The share of each full rank that is kept at the start.
        iterations: Steps of Adam.
        images: Calibration images kept in memory to learn on, at most.
        batch_size: Images a step.
        adapter_lr: Learning rate of the adapters, relative to their size, if they are
            trained together with the cutoffs; 0 keeps them as the metric has them.
        checkpoint: A file that keeps the state now and then and on the way out; if it
            is there, the search goes on from it.
    """

    order: float = 4
    gamma: float = 1.0
    temperature: float = 1.0
    lr: float = 0.01
    initial_cutoff: float = 0.1
    iterations: int = 250
    images: int = 1600
    batch_size: int = 16
    adapter_lr: float = 0.0
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("order", "temperature", "lr", "initial_cutoff", *ZERO_OR_MORE):
            value = getattr(self, name)
            number(f"butterworth.{name}", value)
            check(math.isfinite(value), f"butterworth.{name}", value, "a finite one")
            if name in ZERO_OR_MORE:
                check(value >= 0, f"butterworth.{name}", value, "0 or more")
            else:
                check(value > 0, f"butterworth.{name}", value, "more than 0")
        share = self.initial_cutoff
        check(share <= 1, "butterworth.initial_cutoff", share, "at most 1")
        for name in ("iterations", "images", "batch_size"):
            value = getattr(self, name)
            whole(f"butterworth.{name}", value)
            check(value >= 1, f"butterworth.{name}", value, "1 or more")
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))

    @classmethod
    def of(cls, value: Any) -> "ButterworthConfig":
        """Read a mapping, or take the settings as they are.

        Raises:
            CoRaError: A key is unknown or a value impossible.
        """
        if isinstance(value, cls):
            return value
        return cls(**known(cls, value, "butterworth"))


@dataclass(frozen=True)
class FitConfig:
    """How adapters and biases are refined by distillation, once they are in place.

    Args:
        iterations: Steps of Adam; 0 leaves the closed form as it is.
        scope: `model` follows the float model's outputs through the whole network;
            `layer` has each layer follow its own float output.
        lr: Learning rate of Adam, relative to the size of what it changes.
        images: Calibration images kept in memory to learn on, at most.
        batch_size: Images a step.
        every: Iterations between looks at the held-out images.
        patience: Looks without anything better before it stops.
    """

    iterations: int = 0
    scope: str = "model"
    lr: float = 0.001
    images: int = 512
    batch_size: int = 16
    every: int = 10
    patience: int = 5

    def __post_init__(self) -> None:
        choice("fit.scope", self.scope, SCOPES)
        number("fit.lr", self.lr)
        check(math.isfinite(self.lr) and self.lr > 0, "fit.lr", self.lr, "more than 0")
        whole("fit.iterations", self.iterations)
        steps = self.iterations
        check(steps >= 0, "fit.iterations", steps, "0 (off) or more")
        for name in ("images", "batch_size", "every", "patience"):
            value = getattr(self, name)
            whole(f"fit.{name}", value)
            check(value >= 1, f"fit.{name}", value, "1 or more")

    @classmethod
    def of(cls, value: Any) -> "FitConfig":
        """Read a mapping, a number of iterations, or the settings as they are.

        Raises:
            CoRaError: A key is unknown or a value impossible.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(iterations=value)
        return cls(**known(cls, value, "fit"))
