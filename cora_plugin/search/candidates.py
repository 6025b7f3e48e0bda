"""Candidates: the options of each layer that a strategy chooses from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.form import Form


@dataclass(frozen=True)
class Treatment:
    """What may be done to a layer.

    Args:
        forms: The terms of its adapter; none leaves the layer without one.
        weight_bits: Bit width of its main weight; None: as the host has it.
    """

    forms: tuple[Form, ...] = ()
    weight_bits: int | None = None

    @property
    def rank(self) -> int:
        """The rank, 0 without an adapter.

        Raises:
            CoRaError: The treatment is more than a rank.
        """
        if self.weight_bits is not None or len(self.forms) > 1:
            raise CoRaError(
                "a treatment with a bit width, or with several terms, is no rank; "
                "choose from it by search=spectral"
            )
        return self.forms[0].rank if self.forms else 0


@dataclass(frozen=True)
class Option:
    """A treatment, its cost in the unit of the budget, and the loss that it removes."""

    treatment: Treatment
    cost: int
    gain: float


@dataclass(frozen=True)
class Candidate:
    """One layer's options: the first changes nothing and is free, costs ascend."""

    name: str
    options: tuple[Option, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the options, for strategies that choose ranks and nothing else.

        Raises:
            CoRaError: An option is more than a rank.
        """
        try:
            return tuple(option.treatment.rank for option in self.options)
        except CoRaError as error:
            raise CoRaError(f"{self.name}: {error}") from error


Strategy = Callable[[Sequence[Candidate], float], dict[str, Option]]
"""`strategy(candidates, budget)` gives an option by layer, within the budget."""
