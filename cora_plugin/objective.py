"""What "near to the float model" means: distances between outputs, and their curvature.

A distance is measured sample by sample, so that any part of the data can be used. Its
second derivative at the float model's outputs is estimated by a probe: a random scalar,
the second moment of whose gradient is that curvature (for the KL divergence the Fisher,
by labels drawn from the model; for squared errors by unit noise).
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from cora_plugin.adapters.errors import ConfigError, ModelError
from cora_plugin.adapters.exact import exact
from cora_plugin.outputs import Outputs, only

KEY = ("objective",)


@dataclass(frozen=True)
class Distance:
    """How far a model is from its float original, over some samples.

    `value` is the mean distance in the units of the `objective` of that name (the KL
    divergence's is the nat); `agreement` the share of positions at which both pick the
    same class, None where there are no classes.
    """

    value: float
    agreement: float | None
    objective: str = "kl"

    @property
    def kl(self) -> float:
        """The KL divergence in nats.

        Raises:
            AttributeError: Another distance was measured.
        """
        if self.objective != "kl":
            raise AttributeError(f"the objective is {self.objective}; read .value")
        return self.value

    @property
    def title(self) -> str:
        """What reports and pictures call it."""
        return {"kl": "KL", "mse": "MSE"}.get(self.objective, self.objective)

    def __str__(self) -> str:
        """As reports show it."""
        text = f"{self.title} {self.value:.4g}"
        if self.agreement is None:
            return text
        return f"{text}, agreement {self.agreement:.1%}"


class Objective(Protocol):
    """A distance from the float model's outputs."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """Distance of each sample, [N], 0 where both agree; differentiable."""

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """A random scalar, summed over samples.

        The second moment of its gradient with respect to a sample's outputs is the
        second derivative of `distance` at its minimum.
        """

    def agreement(self, reference: Outputs, outputs: Outputs) -> float | None:
        """Share of positions at which both pick the same class, if there are any."""


def distances(objective: Objective, reference: Outputs, outputs: Outputs) -> Tensor:
    """The distance of each sample, [N], in float64."""
    pair = (
        {name: exact(value) for name, value in each.items()}
        for each in (reference, outputs)
    )
    return objective.distance(*pair)


def measure(objective: Objective, reference: Outputs, outputs: Outputs) -> Distance:
    """The mean distance over all samples, in float64.

    Outputs that are not finite are infinitely far away.
    """
    each = distances(objective, reference, outputs)
    return averaged(objective, each, reference, outputs)


def averaged(
    objective: Objective, each: Tensor, reference: Outputs, outputs: Outputs
) -> Distance:
    """What `measure` gives, from the `distances` of these outputs, [N]."""
    value = float(each.mean())
    return Distance(
        value if value == value else float("inf"),
        objective.agreement(reference, outputs),
        objective.name,
    )


@dataclass(frozen=True)
class KL:
    """KL divergence of logits [N, classes, …] from the float model's, in nats.

    Positions behind the classes count alike; a sample's distance is their mean.
    """

    name: str = "kl"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """`Σ p (log p − log q)` over classes, mean over positions, [N]."""
        p = _logits(reference).log_softmax(1)
        q = _logits(outputs).log_softmax(1)
        divergence: Tensor = (p.exp() * (p - q)).sum(1)
        return divergence if divergence.ndim == 1 else divergence.flatten(1).mean(1)

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """Log-likelihood of labels that are drawn from the outputs themselves."""
        log_likelihood: Tensor = _logits(outputs).log_softmax(1)
        labels = _drawn(log_likelihood.detach(), random)
        # Positions are independent: their curvatures add up, the distance is a mean.
        count = labels[0].numel()
        probe: Tensor = log_likelihood.gather(1, labels).sum() / count**0.5
        return probe

    def agreement(self, reference: Outputs, outputs: Outputs) -> float:
        """Share of positions with the same first class."""
        same = _logits(reference).argmax(1) == _logits(outputs).argmax(1)
        return float(exact(same).mean())


@dataclass(frozen=True)
class MSE:
    """Half the squared error of outputs [N, …], mean over a sample's values."""

    name: str = "mse"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """`½ mean (y − ŷ)²`, [N]."""
        half = (only(outputs) - only(reference)).square() / 2
        mean: Tensor = half.flatten(1).mean(1)
        return mean

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """The outputs' product with unit noise, a value's share of the mean."""
        output = only(outputs)
        noise = torch.randn(output.shape, generator=random).to(output)
        probe: Tensor = (output * noise).sum() / (output[0].numel() ** 0.5)
        return probe

    def agreement(self, reference: Outputs, outputs: Outputs) -> None:
        """There are no classes."""
        return None


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of objectives, each of one output by name.

    Args:
        parts: Objectives by output name.
        weights: By output name; 1 where none is given.
    """

    parts: Mapping[str, Objective]
    weights: Mapping[str, float] = field(default_factory=dict)
    name: str = "weighted"

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError(KEY, "no output is named; name at least one")
        for name in self.weights:
            if name not in self.parts:
                raise ConfigError(
                    KEY,
                    f"{name!r} has a weight and no objective; the outputs named are "
                    f"{', '.join(self.parts)}",
                )

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """`Σ w_i d_i`, [N]."""
        return _added(
            self.weights.get(name, 1.0) * part.distance(*_one(name, reference, outputs))
            for name, part in self.parts.items()
        )

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """`Σ √w_i p_i`: probes are independent, so that their curvatures add up."""
        return _added(
            self.weights.get(name, 1.0) ** 0.5
            * part.probe(_one(name, outputs)[0], random)
            for name, part in self.parts.items()
        )

    def agreement(self, reference: Outputs, outputs: Outputs) -> float | None:
        """The mean of those that have classes."""
        shares = [
            share
            for name, part in self.parts.items()
            if (share := part.agreement(*_one(name, reference, outputs))) is not None
        ]
        return sum(shares) / len(shares) if shares else None


@dataclass(frozen=True)
class Custom:
    """Any distance; its curvature is taken for that of squared errors.

    Args:
        function: `function(reference, outputs)` of tensors [N, …], where the model has
            one output, or of mappings by name; gives the distance of each sample, [N].
    """

    function: Callable[[Any, Any], Tensor]
    name: str = "custom"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """What the function returns, [N].

        Raises:
            ConfigError: It is not one number a sample.
        """
        pair = [only(e) if len(e) == 1 else e for e in (reference, outputs)]
        found = self.function(*pair)
        samples = len(next(iter(outputs.values())))
        if not isinstance(found, Tensor) or found.shape != (samples,):
            shape = list(found.shape) if isinstance(found, Tensor) else found
            raise ConfigError(
                KEY,
                f"the function gave {shape} for {samples} samples; return one distance "
                f"a sample, [{samples}]",
            )
        return found

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """That of squared errors, all outputs alike."""
        return _added(
            MSE().probe({name: value}, random) for name, value in outputs.items()
        )

    def agreement(self, reference: Outputs, outputs: Outputs) -> None:
        """None: the function knows of no classes."""
        return None


def _added(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, parts)


def _one(name: str, *outputs: Outputs) -> list[Outputs]:
    """One output by name, as that of a model that has no other.

    Raises:
        ConfigError: The model has no such output.
    """
    for each in outputs:
        if name not in each:
            raise ConfigError(
                KEY,
                f"the model has no output {name!r}; it has "
                f"{', '.join(map(repr, each))}",
            )
    return [{"": each[name]} for each in outputs]


def _logits(outputs: Outputs) -> Tensor:
    """The one output [N, classes, …].

    Raises:
        ModelError: There are several, or it has no classes.
    """
    output = only(outputs)
    if output.ndim < 2:
        raise ModelError(
            f"the model's output is a tensor {list(output.shape)}, not logits [N, "
            "classes, …]; wrap the model so that its forward returns logits"
        )
    return output


def _drawn(log_probabilities: Tensor, random: torch.Generator) -> Tensor:
    """Draw a class for each sample and position of [N, classes, …]; [N, 1, …]."""
    last = log_probabilities.movedim(1, -1)  # [N, …, classes]
    drawn = torch.multinomial(last.exp().cpu().flatten(0, -2), 1, generator=random)
    return drawn.view(*last.shape[:-1], 1).movedim(-1, 1).to(log_probabilities.device)
