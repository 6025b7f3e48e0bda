"""How the target transition rate runs over training: factors of the first one."""

import math
from collections.abc import Callable

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.typed import unknown

Schedule = Callable[[float], float]
"""From the share of training that is done, 0 to 1, to a factor of the target."""


def cosine(done: float) -> float:
    """From 1 to 0, half a period: `(1 + cos πx) / 2`."""
    return (1 + math.cos(math.pi * done)) / 2


def linear(done: float) -> float:
    """From 1 to 0."""
    return 1 - done


def step(done: float) -> float:
    """A tenth from the middle on, a hundredth from three quarters on."""
    return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01


SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "step": step}


def schedule_of(given: str | Schedule) -> Schedule:
    """A schedule by its name, or the function itself.

    Raises:
        ConfigError: The name is unknown.
    """
    if callable(given):
        return given
    if given not in SCHEDULES:
        raise ConfigError(("schedule",), unknown("schedule", given, SCHEDULES))
    return SCHEDULES[given]


def target_at(
    step: int, target: float, schedule: Schedule, steps: int, warmup: int
) -> float:
    """The target rate `R_t` at a step.

    Args:
        step: Steps that are done.
        target: The first target, reached after the warm-up.
        schedule: Its factor over the rest.
        steps: All steps; afterwards it stays as at the last.
        warmup: Steps in which the target rises linearly from near 0.

    Raises:
        ConfigError: The factor is negative or not finite.
    """
    if step < warmup:
        return target * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    factor = schedule(done)
    if not 0 <= factor < math.inf:
        raise ConfigError(
            ("schedule",), f"it gives {factor} at {done:.3g}; give 0 or more, finite"
        )
    return target * factor
