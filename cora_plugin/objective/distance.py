"""How far outputs are from the float model's, summed part by part."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.exact import exact
from cora_plugin.outputs import Outputs

CHUNK = 2**22
"""Most output values that are compared at a time: 32 MiB in float64."""

TITLES = {"kl": "KL", "mse": "MSE", "bernoulli": "Bernoulli KL", "cosine": "1 − cos"}
"""What reports call the distances that are built in."""


@dataclass(frozen=True)
class Distance:
    """How far a model is from its float original, over some samples.

    `value` is the mean distance in the units of the `objective` of that name (the KL
    divergence's is the nat); `agreement` the share of positions at which both pick the
    same class, None where there are no classes; `power` the mean square of the float
    outputs, where it is known.
    """

    value: float
    agreement: float | None
    objective: str = "kl"
    power: float | None = None

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
    def decibels(self) -> float | None:
        """The signal-to-noise ratio of squared errors, 10 log10(power / MSE), in dB."""
        if self.objective != "mse" or self.power is None:
            return None
        if not self.value:
            return math.inf
        ratio = self.power / self.value
        return 10 * math.log10(ratio) if ratio else -math.inf

    @property
    def title(self) -> str:
        """What reports and pictures call it."""
        return TITLES.get(self.objective, self.objective)

    def __str__(self) -> str:
        """As reports show it."""
        text = f"{self.title} {self.value:.4g}"
        if self.decibels is not None:
            text += f" ({self.decibels:.1f} dB)"
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


@dataclass
class Sums:
    """The distance of samples that come part by part, in float64.

    Only a part is there at a time. Outputs that are not finite are infinitely far away.
    """

    objective: Objective
    each: list[Tensor] = field(default_factory=list)
    _agreeing: float = 0.0
    _judged: int = 0
    _power: float = 0.0
    _values: int = 0

    def add(self, reference: Outputs, outputs: Outputs) -> None:
        """Add some samples.

        Raises:
            ModelError: The outputs are of other shapes than the float model's.
        """
        check_shapes(reference, outputs)
        for one, other in zip(_parts(reference), _parts(outputs), strict=True):
            pair = [{n: exact(value) for n, value in e.items()} for e in (one, other)]
            found = self.objective.distance(*pair)
            self.each.append(found.cpu())
            share = self.objective.agreement(*pair)
            if share is not None:
                self._agreeing += share * len(found)
                self._judged += len(found)
            if self.objective.name == "mse":
                for value in pair[0].values():
                    self._power += float(value.square().sum())
                    self._values += value.numel()

    def pool(self) -> None:
        """Add the samples of other processes; all have them in the same order."""
        seen = [self._agreeing, self._judged, self._power, self._values]
        agreeing, judged, power, values = processes.add_up("outputs", (), seen)
        self._agreeing, self._judged = agreeing, int(judged)
        self._power, self._values = power, int(values)
        parts = processes.gathered("distances", self.each)
        self.each = [each for part in parts for each in part]

    @property
    def distances(self) -> Tensor:
        """The distance of each sample, [N]."""
        return torch.cat(self.each)

    @property
    def distance(self) -> Distance:
        """The mean over all samples."""
        value = float(self.distances.mean())
        return Distance(
            value if value == value else math.inf,
            self._agreeing / self._judged if self._judged else None,
            self.objective.name,
            self._power / self._values if self._values else None,
        )


def distances(objective: Objective, reference: Outputs, outputs: Outputs) -> Tensor:
    """The distance of each sample, [N], in float64."""
    sums = Sums(objective)
    sums.add(reference, outputs)
    return sums.distances


def standard_error(samples: Tensor) -> float | None:
    """The standard error of the mean of samples [N].

    None where it is not known: of a single sample, or where one is not finite.
    """
    if len(samples) < 2 or not torch.isfinite(samples).all():
        return None
    return float(samples.std() / len(samples) ** 0.5)


def measure(objective: Objective, reference: Outputs, outputs: Outputs) -> Distance:
    """The mean distance over all samples, in float64."""
    sums = Sums(objective)
    sums.add(reference, outputs)
    return sums.distance


def averaged(
    objective: Objective, each: Tensor, reference: Outputs, outputs: Outputs
) -> Distance:
    """What `measure` gives, from the distances of these outputs, [N]."""
    value = float(each.mean())
    share = objective.agreement(reference, outputs)
    return Distance(value if value == value else math.inf, share, objective.name)


def check_shapes(reference: Outputs, outputs: Outputs) -> None:
    """Check that a quantized model's outputs can be compared with the float model's.

    Raises:
        ModelError: They are of other shapes.
    """
    for name, value in reference.items():
        other = outputs.get(name)
        if other is None or other.shape != value.shape:
            found = "none" if other is None else list(other.shape)
            raise ModelError(
                f"output {name!r}: {list(value.shape)} of the float model and {found} "
                "of the quantized one for the same images; where their number depends "
                "on the values (boxes behind a non-maximum suppression), wrap the "
                "model so that its forward returns what comes before"
            )


def _parts(outputs: Outputs) -> Iterator[Outputs]:
    """The samples in parts of at most `CHUNK` values, where outputs have one a row."""
    counts = {value.shape[:1] for value in outputs.values()}
    if len(counts) != 1 or () in counts:
        yield outputs
        return
    ((rows,),) = counts
    values = sum(value.numel() for value in outputs.values())
    size = max(1, CHUNK * rows // max(values, 1))
    for start in range(0, rows, size):
        yield {n: value[start : start + size] for n, value in outputs.items()}
