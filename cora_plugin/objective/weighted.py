"""A distance of several outputs, each with its own."""

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cora_plugin.adapters.errors import ConfigError, ModelError
from cora_plugin.objective.distance import Objective
from cora_plugin.objective.kinds import KEY
from cora_plugin.outputs import Outputs


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
        """`Σ w_i d_i`, [N].

        Raises:
            ModelError: Outputs do not have as many rows as one another.
        """
        found = {
            name: self.weights.get(name, 1.0)
            * part.distance(*_one(name, reference, outputs))
            for name, part in self.parts.items()
        }
        rows = {name: len(each) for name, each in found.items()}
        if len({*rows.values()}) > 1:
            told = ", ".join(f"{name!r} {count}" for name, count in rows.items())
            raise ModelError(
                "outputs are measured sample by sample, and have other numbers of "
                f"rows: {told}; wrap the model so that each is [N, …] of its N inputs, "
                "or name those that are by objective"
            )
        return _added(found.values())

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
