"""Chooses a treatment for each layer within a budget."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from cora_plugin.adapters import Adapter, Form
from cora_plugin.adapters.errors import BudgetError
from cora_plugin.budget import allowance, behind, form_of, ladder
from cora_plugin.config import Budget, CoRaConfig
from cora_plugin.layer import QuantizedLayer, by_layer
from cora_plugin.residuals import Residuals
from cora_plugin.search import Candidate, Network, Option, Treatment, strategy

NOTHING = Treatment()
"""A layer left as the host has it."""


@dataclass(frozen=True)
class Plan:
    """The treatments chosen; `used` of the budget `allowed`, in its `unit`."""

    treatments: Mapping[str, Treatment]
    used: float
    allowed: float
    unit: str


def pinned_ranks(
    ranks: Mapping[str, int], layers: Sequence[QuantizedLayer]
) -> dict[str, int]:
    """The ranks that are fixed by layer name or glob; the last that fits wins.

    Raises:
        ConfigError: A name or glob fits no layer.
        BudgetError: A rank exceeds a layer's full rank.
    """
    pinned = by_layer("ranks", ranks, [layer.name for layer in layers])
    for layer in layers:
        rank = pinned.get(layer.name, 0)
        if rank > layer.full_rank:
            raise BudgetError(
                f"{layer.name}: rank {rank} exceeds its full rank {layer.full_rank}; "
                f"pass ranks={{{layer.name!r}: r}} with r <= {layer.full_rank}"
            )
    return pinned


class Planner:
    """Offers the layers' options to the strategy, for any number of budgets.

    Args:
        config: The settings.
        layers: All layers of the model.
        residuals: Of the layers that are not pinned to rank 0.
        pinned: Ranks by layer that are not to be chosen.
        network: What a learning strategy runs.
    """

    def __init__(
        self,
        config: CoRaConfig,
        layers: Sequence[QuantizedLayer],
        residuals: Residuals,
        pinned: Mapping[str, int],
        network: Network,
    ) -> None:
        self._config = config
        self._layers = layers
        self._residuals = residuals
        self._network = network
        budget = config.budget
        in_bits = budget.is_target or budget.is_total
        self.unit = "bits" if in_bits else budget.unit
        targets = {layer.name: layer for layer in residuals.layers}
        self._pinned = {
            name: self._treatment(targets[name], rank) if rank else NOTHING
            for name, rank in pinned.items()
        }

    def within(self, budget: Budget) -> Plan:
        """Treatments that cost at most a budget.

        Raises:
            BudgetError: It buys no adapter, buys more than there is, or is less than
                pinned ranks cost.
        """
        if self._config.search == "series":
            return self._series()
        allowed = self._allowance(budget)
        spent = sum(self._cost(name, e) for name, e in self._pinned.items())
        if self._nothing_to_choose and budget == CoRaConfig.budget:
            allowed = max(allowed, spent)  # None was given, and none is needed.
        self._check(budget, spent, allowed)
        choose = strategy(self._config, self._network, allowed / budget.amount)
        chosen = choose(self._candidates, allowed - spent)
        return Plan(
            {
                **self.nothing().treatments,
                **self._pinned,
                **{name: e.treatment for name, e in chosen.items()},
            },
            spent + sum(option.cost for option in chosen.values()),
            allowed,
            budget.unit,
        )

    @property
    def _nothing_to_choose(self) -> bool:
        """Whether the ranks of all layers are pinned."""
        return all(layer.name in self._pinned for layer in self._residuals.layers)

    def _series(self) -> Plan:
        """As many whole terms as the config says, for every layer that is free."""
        config, treatments = self._config, dict(self._pinned)
        for layer in self._residuals.layers:
            shape, groups = tuple(layer.weight.shape), layer.operation.groups
            form = Form.whole(config.adapter_bits, shape, groups)
            treatments.setdefault(layer.name, Treatment((form,) * config.terms))
        used = sum(self._cost(name, each) for name, each in treatments.items())
        return Plan(treatments, used, used, self.unit)

    def nothing(self) -> Plan:
        """The plan without adapters."""
        names = (layer.name for layer in self._residuals.layers)
        return Plan(dict.fromkeys(names, NOTHING), 0, 0, self.unit)

    @cached_property
    def whole(self) -> Budget:
        """The budget that buys the most for every layer, pinned ones too."""
        return Budget(
            self._cost_of_whole / self._allowance(Budget(1, self.unit)), self.unit
        )

    @cached_property
    def _cost_of_whole(self) -> float:
        most = 0
        for layer in self._residuals.layers:
            forms = ladder(layer, self._config.adapter_bits)
            costs = [self._cost(layer.name, Treatment((form,))) for form in forms]
            pinned = self._pinned.get(layer.name, NOTHING)
            most += max([self._cost(layer.name, pinned), *costs])
        return most

    def _treatment(self, layer: QuantizedLayer, rank: int) -> Treatment:
        return Treatment((form_of(layer, rank, self._config.adapter_bits),))

    def _cost(self, name: str, treatment: Treatment) -> int:
        positions = self._residuals.positions  # None of layers that never ran.
        return sum(
            form.cost(*positions[name]).of(self.unit) for form in treatment.forms
        )

    def _allowance(self, budget: Budget) -> float:
        # A layer that is left alone was not observed; it counts with its parameters and
        # bits, and its share of the MACs is not offered to the others.
        counted = self._residuals.layers if budget.unit == "macs" else self._layers
        return allowance(budget, counted, self._residuals.positions)

    @cached_property
    def _candidates(self) -> Sequence[Candidate]:
        found = []
        for layer in self._residuals.layers:
            if layer.name in self._pinned:
                continue
            removed = [0.0, *accumulate(self._residuals.spectra[layer.name])]
            options = [Option(NOTHING, 0, 0.0)]
            single = ladder(layer, self._config.adapter_bits, self._term_bits)
            offered = [*((form,) for form in single), *behind(single, self._term_bits)]
            for terms in offered:
                last, gain = terms[-1], removed[terms[0].rank]
                if self._term_bits and not last.factored:
                    gain = removed[-1] - self._residuals.left_by(layer, terms)
                treatment = Treatment(terms)
                cost = self._cost(layer.name, treatment)
                options.append(Option(treatment, cost, gain))
            options.sort(key=lambda option: option.cost)
            if len(options) > 1:
                found.append(Candidate(layer.name, tuple(options)))
        return found

    @property
    def _term_bits(self) -> Collection[int]:
        """Widths of whole terms; strategies other than `spectral` choose ranks alone.

        Where parameters or MACs are counted, fewer bits are no cheaper.
        """
        chosen = self._config.search == "spectral" and self.unit == "bits"
        return self._config.term_bits if chosen else ()

    def _check(self, budget: Budget, spent: float, allowed: float) -> None:
        """Refuse a budget that nothing fits in, or that nothing could use up.

        Pinned ranks may leave some of a budget unspent.
        """
        scale = budget.amount / allowed
        if spent > allowed:
            raise BudgetError(
                f"budget: the pinned ranks alone cost {spent * scale:.4g} "
                f"{budget.unit}, more than {budget}; lower the ranks or raise the "
                "budget"
            )
        if self._candidates and allowed > self._cost_of_whole * (1 + 1e-9):
            raise BudgetError(
                f"budget: {budget} is more than there is to buy; every residual whole "
                f"costs {self._cost_of_whole * scale:.4g} {budget.unit}"
            )
        least = min((c.options[1].cost for c in self._candidates), default=0)
        if not spent and least > allowed:
            raise BudgetError(
                f"budget: {budget} buys no adapter; the cheapest costs "
                f"{least * scale:.4g} {budget.unit}"
            )


def merged_weights(
    layers: Sequence[QuantizedLayer], adapters: Mapping[str, Adapter]
) -> dict[str, Tensor]:
    """`Wq + BA` by layer name, of the layers that have an adapter."""
    return {
        layer.name: layer.dequantized
        + adapters[layer.name].merged().to(layer.dequantized)
        for layer in layers
        if layer.name in adapters
    }
