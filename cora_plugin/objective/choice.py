"""Decides how a model's outputs are measured, and says what was decided."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.adapters.exact import exact
from cora_plugin.config import CoRaConfig
from cora_plugin.config.objective import AUTO, Part, part_of
from cora_plugin.host import Host
from cora_plugin.objective.distance import TITLES, Objective
from cora_plugin.objective.kinds import KEY, KL, MSE, Bernoulli, Cosine, Custom
from cora_plugin.objective.weighted import Weighted
from cora_plugin.outputs import Batch, Outputs

log = logging.getLogger(__name__)

FEW = 4
"""Dense outputs of so many channels or fewer are as often images as classes."""

SEVERAL = 4
"""So many logits of yes and no of a trained network are not all from 0 to 1."""

DECIDED = 0.5
"""Of the entropy of equal classes, what logits of a trained network stay below."""

NEAR = 1e-2
"""How near to 1 a sum of probabilities or a length is that is 1, in half precision."""


@dataclass(frozen=True)
class Choice:
    """An objective, what was decided on the way to it, and what is doubtful in that."""

    objective: Objective
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def decide(
    config: CoRaConfig,
    reference: Outputs,
    images: Tensor | None = None,
    channels: int | None = None,
) -> Choice:
    """The objective that a config asks for, for a model of these outputs.

    Doubts are logged as warnings.

    Args:
        config: The settings.
        reference: Outputs of the float model, for a batch or more.
        images: The model's input, where it is one tensor of floats.
        channels: Output channels of the quantized layer that ran last.

    Raises:
        ConfigError: The model has no such output, or none that can be measured.
    """
    wanted = {"dB": "mse"}.get(config.budget.unit, config.budget.unit)
    scene = _Scene(images, channels, wanted)
    if isinstance(config.objective, Mapping):
        choice = _by_name(config, reference, scene)
    elif callable(config.objective):
        choice = Choice(_custom(config.objective))
    else:
        choice = _alike(part_of(config.objective, config.axis), reference, scene)
    for doubt in choice.doubts:
        log.warning("%s", doubt)
    _check_target(config, choice)
    return choice


@torch.no_grad()
def decide_on(
    host: Host,
    config: CoRaConfig,
    batch: Batch,
    channels: int | None = None,
    outputs: Outputs | None = None,
) -> Choice:
    """The objective that a config asks for, by the float model's outputs for a batch.

    Args:
        host: The prepared host.
        config: The settings.
        batch: Some of the data.
        channels: As for `decide`.
        outputs: A teacher's outputs for the batch, in place of the float model's.
    """
    reference = outputs
    if reference is None:
        with host.acting(quantized=False):
            reference = host.run(batch)
    images = batch if isinstance(batch, Tensor) and batch.is_floating_point() else None
    return decide(config, reference, images, channels)


@dataclass(frozen=True)
class _Scene:
    """What is known beside the outputs: see `decide`; `wanted` by a target's unit."""

    images: Tensor | None
    channels: int | None
    wanted: str


@dataclass(frozen=True)
class _Found:
    objective: Objective
    note: str = ""
    doubt: str = ""


def _alike(part: Part, reference: Outputs, scene: _Scene) -> Choice:
    """All outputs by one rule; those that cannot be measured are left out."""
    usable = {n: v for n, v in reference.items() if _measurable(v)}
    left = [
        f"output {name!r} is left out: {list(value.shape)} of {value.dtype}"
        for name, value in reference.items()
        if name not in usable
    ]
    if not usable:
        raise ConfigError(
            KEY,
            f"no output can be measured ({'; '.join(left)}); have the model return "
            "what it computes in floats",
        )
    if len(reference) == 1:
        found = _one("", next(iter(usable.values())), part, scene)
        return _choice(found.objective, {"": found}, left)
    found_by = {n: _one(n, v, part, scene) for n, v in usable.items()}
    return _choice(_weighted(found_by, {}, usable), found_by, left)


def _by_name(config: CoRaConfig, reference: Outputs, scene: _Scene) -> Choice:
    names = config.objective
    for name in names:
        if name not in reference:
            raise ConfigError(
                (*KEY, name),
                f"the model has no output {name!r}; it has "
                f"{', '.join(map(repr, reference))}",
            )
    parts = {name: part_of(value, config.axis) for name, value in names.items()}
    found = {n: _one(n, reference[n], part, scene) for n, part in parts.items()}
    left = [f"output {n!r} is left out" for n in reference if n not in found]
    weights = {name: part.weight for name, part in parts.items()}
    return _choice(_weighted(found, weights, reference), found, left)


def _weighted(
    found: Mapping[str, _Found], weights: Mapping[str, float], reference: Outputs
) -> Weighted:
    """Squared errors over their output's variance, so that none drowns another."""
    scaled = {}
    for name, each in found.items():
        scale = 1.0
        if each.objective.name == "mse":
            variance = float(exact(reference[name]).var(correction=0))
            scale = 1 / variance if variance > 0 else 1.0
        scaled[name] = weights.get(name, 1.0) * scale
    return Weighted({name: each.objective for name, each in found.items()}, scaled)


def _choice(
    objective: Objective, found: Mapping[str, _Found], left: list[str]
) -> Choice:
    notes = [each.note for each in found.values() if each.note]
    doubts = tuple(each.doubt for each in found.values() if each.doubt)
    return Choice(objective, (*notes, *left), doubts)


def _one(name: str, value: Tensor, part: Part, scene: _Scene) -> _Found:
    """How one output is measured."""
    if callable(part.how):
        return _Found(_custom(part.how))
    if part.how != AUTO:
        made = _named(part.how, 1 if part.axis is None else part.axis, value)
        return _Found(made, _read_as(made, _called(name, value)))
    return _guess(name, value, part.axis, scene)


def _named(how: str, axis: int, value: Tensor) -> Objective:
    makers: dict[str, Any] = {
        "kl": lambda: KL(axis, _is_distribution(value, axis)),
        "mse": MSE,
        "bernoulli": lambda: Bernoulli(_is_probability(value)),
        "cosine": lambda: Cosine(axis),
    }
    made: Objective = makers[how]()
    made.distance({"": value}, {"": value})  # Refuses a single channel.
    return made


def _guess(name: str, value: Tensor, axis: int | None, scene: _Scene) -> _Found:
    """What an output is, by its shape and values."""
    shape, here = list(value.shape), _called(name, value)
    if axis is None and value.ndim == 2:
        axis = 1
    one = value.ndim == 1 or value[0].numel() == 1
    if one or shape[1 if axis is None else axis] == 1:
        if scene.wanted == "bernoulli":
            made = _named("bernoulli", 1, value)
            said = f"{here}: yes and no, as the budget says"
            return _Found(made, _read_as(made, here) or said)
        return _Found(
            MSE(),
            f"{here} has one channel: squared error ({_setting(name, 'bernoulli')} if "
            "it is the logit or the probability of yes)",
        )
    if axis is None and _is_image(value, scene.images):
        return _Found(MSE(), f"{here}: images as the input's: squared error")
    if axis is None:
        axis = _channel_axis(value, scene)
    if axis is None and scene.wanted == "kl":
        axis = 1  # The budget says that there are classes.
    if scene.wanted in ("mse", "bernoulli", "cosine"):
        made = _named(scene.wanted, 1 if axis is None else axis, value)
        said = f"{here}: {made.name}, as the budget says"
        return _Found(made, _read_as(made, here) or said)
    if axis is None:
        doubt = (
            f"{here}: it is not clear whether and along which axis it has classes, so "
            f"squared error is used; pass {_setting(name, 'mse')}, or "
            f"{_setting(name, 'kl', 1)} to {value.ndim - 1}, to say so"
        )
        return _Found(MSE(), doubt, doubt)
    if _is_distribution(value, axis):
        return _Found(KL(axis, True), f"{here}: probabilities along axis {axis}: kl")
    if value.ndim == 2 and _is_unit(value):
        return _Found(Cosine(), f"{here}: vectors of length 1: cosine")
    if len(value) > 1 and float(value.min()) >= 0 and not _decides(value, axis):
        return _Found(
            MSE(),
            f"{here}: none is negative and none stands out, so no logits: squared "
            f"error ({_setting(name, 'kl')} if they are)",
        )
    return _Found(
        KL(axis),
        f"{here} is taken for logits of {shape[axis]} classes along axis {axis}: kl "
        f"({_setting(name, 'mse')} or cosine if they are none)",
    )


def _called(name: str, value: Tensor) -> str:
    """An output by name and shape, as notes begin."""
    return f"{f'output {name!r}' if name else 'the output'} {list(value.shape)}"


def _setting(name: str, how: str, axis: int | None = None) -> str:
    """The setting that says how an output is measured, as it is to be written."""
    if not name:
        return f"objective={how}" + ("" if axis is None else f" with axis={axis}")
    part = repr(how if axis is None else {"of": how, "axis": axis})
    return f"objective={{{name!r}: {part}, …}}"


def _read_as(made: Objective, here: str) -> str:
    """What is said where values tell how a named distance reads them."""
    if isinstance(made, Bernoulli) and made.probabilities:
        return f"{here} is all from 0 to 1: probabilities of yes, not logits"
    return ""


def _channel_axis(value: Tensor, scene: _Scene) -> int | None:
    """The axis of a dense output that the last layer's channels are on."""
    axes = [a for a in range(1, value.ndim) if value.shape[a] == scene.channels]
    if len(axes) != 1 or value.shape[axes[0]] <= FEW:
        return None
    return axes[0]


def _is_image(value: Tensor, images: Tensor | None) -> bool:
    """Whether an output has the axes and the channels of the input."""
    if images is None or value.ndim < 3:
        return False
    return images.ndim == value.ndim and images.shape[1] == value.shape[1]


def _is_distribution(value: Tensor, axis: int) -> bool:
    if not -value.ndim <= axis < value.ndim or float(value.min()) < 0:
        return False
    total = exact(value).sum(axis)
    return bool((total - 1).abs().max() < NEAR)


def _is_probability(value: Tensor) -> bool:
    """Whether values are probabilities: logits of so many are not all from 0 to 1."""
    inside = float(value.min()) >= 0 and float(value.max()) <= 1
    return inside and value.numel() >= SEVERAL


def _decides(value: Tensor, axis: int) -> bool:
    """Whether a softmax has much less entropy than that of equal classes.

    Logits may all be positive, as those of SqueezeNet, which ends in a ReLU; features
    behind a ReLU are, too, but no few of them stand out so far.
    """
    logs = exact(value).log_softmax(axis)
    entropy = -(logs.exp() * logs).sum(axis).mean()
    return float(entropy) < DECIDED * math.log(value.shape[axis])


def _is_unit(value: Tensor) -> bool:
    return bool((exact(value).norm(dim=1) - 1).abs().max() < NEAR)


def _measurable(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim > 0 and value.numel() > 0


def _custom(function: Any) -> Custom:
    name = getattr(function, "__name__", type(function).__name__)
    taken = name == "<lambda>" or name in TITLES
    return Custom(function, "custom" if taken else name)


def _check_target(config: CoRaConfig, choice: Choice) -> None:
    """Refuse a target in a unit that the objective does not have.

    Raises:
        ConfigError: It is one.
    """
    budget, name = config.budget, choice.objective.name
    if not budget.is_target or budget.unit in ("agreement", "distance"):
        return
    if name != {"dB": "mse"}.get(budget.unit, budget.unit):
        unit = name if name in ("kl", "mse", "bernoulli", "cosine") else "distance"
        raise ConfigError(
            ("budget",),
            f"{budget} asks for {budget.unit}, and outputs are measured by {name}; "
            f"ask for '… {unit}', or set the objective",
        )
