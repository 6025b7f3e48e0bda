"""What a scheduler asks of its settings, its optimizer and of gradients."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

from cora_plugin.adapters.errors import ConfigError, ModelError
from cora_plugin.host import Latent
from cora_plugin.training import Group


def check_settings(
    target: float,
    steps: int,
    warmup: int,
    momentum: float | None,
    eta: float | None,
    window: int,
) -> None:
    """Refuse settings of a scheduler that are out of range.

    Raises:
        ConfigError: One is, or is no number.
    """
    problems = (
        ("target", target, "a share of weights, above 0 and below 1", _open(target, 1)),
        ("steps", steps, "the number of all steps, 1 or more", _whole(steps, 1)),
        (
            "warmup",
            warmup,
            f"0 or more, fewer than {steps} steps",
            _whole(warmup, 0) and _whole(steps, warmup + 1),
        ),
        (
            "momentum",
            momentum,
            "0 or more and less than 1",
            momentum in (None, 0) or _open(momentum, 1),
        ),
        ("eta", eta, "more than 0", eta is None or _open(eta, math.inf)),
        ("window", window, "a number of steps, 0 or more", _whole(window, 0)),
    )
    for name, value, use, right in problems:
        if not right:
            raise ConfigError((name,), f"{value!r} is out of range; use {use}")


def _open(value: Any, below: float) -> bool:
    return bool(0 < _number(value, Real) < below)


def _whole(value: Any, least: int) -> bool:
    return bool(_number(value, Integral) >= least)


def _number(value: Any, kind: type) -> Any:
    """A value, or what is within no bounds."""
    return value if isinstance(value, kind) else math.nan


def places_of(
    optimizer: torch.optim.Optimizer, latents: Sequence[Latent], alone: bool
) -> list[int]:
    """The places of the optimizer's groups that hold latent weights.

    Raises:
        ModelError: It lacks one, or a group holds other parameters, too, while the
            latent ones are to be `alone`.
    """
    latent = {each.weight for each in latents}
    places = [
        place
        for place, group in enumerate(optimizer.param_groups)
        if latent & {*group["params"]}
    ]
    held = {p for place in places for p in optimizer.param_groups[place]["params"]}
    missing = [each.name for each in latents if each.weight not in held]
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise ModelError(
            f"the optimizer does not hold the weights of {names} ({len(missing)} of "
            f"{len(latents)} latent weights); make its groups by param_groups(model)"
        )
    others = sum(p.requires_grad for p in held - latent)
    if others and alone:
        raise ModelError(
            f"a group of the optimizer holds {others} other parameters beside latent "
            "weights, whose learning rate the scheduler sets; make the groups by "
            "param_groups(model)"
        )
    return places


def first_rate(groups: Sequence[Group], controlled: bool) -> float:
    """The first learning rate of the groups that hold latent weights.

    Raises:
        ConfigError: It is to be controlled, and is not one, or 0.
    """
    if not controlled:
        return float(groups[0]["lr"])
    # Another scheduler's warm-up may have begun, often at 0.
    rates = {float({"initial_lr": g["lr"], **g}["initial_lr"]) for g in groups}
    if len(rates) > 1:
        raise ConfigError(
            ("optimizer",),
            f"latent weights have learning rates {sorted(rates)}; the scheduler "
            "has one for the whole model: give their groups the same",
        )
    first = rates.pop()
    if not first:
        raise ConfigError(
            ("optimizer",),
            "the learning rate of latent weights is 0, from which none follows; give "
            "their group the one to begin with",
        )
    return first


def finite(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all gradients of an optimizer are finite."""
    slopes = [
        parameter.grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if not slopes:
        return True
    norms = [
        torch.linalg.vector_norm(
            slope, dtype=torch.promote_types(slope.dtype, torch.float32)
        )
        for slope in slopes
    ]
    return bool(
        torch.stack([norm.isfinite().to(norms[0].device) for norm in norms]).all()
    )
