"""Which rank each layer gets: candidates, the search, and budgets that are targets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from cora_plugin.adapters import Adapter, Factors
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import Weighting, removed_error
from cora_plugin.budget import adapter_cost, allowance, ladder, stored_bits
from cora_plugin.config import Budget, CoRaConfig
from cora_plugin.divergence import Divergence
from cora_plugin.guard import Guard
from cora_plugin.layer import Host, QuantizedLayer, by_layer
from cora_plugin.report import SweepPoint
from cora_plugin.search import Candidate, Network, strategy
from cora_plugin.statistics import LayerStatistics

RANGE = 2**10
"""Ratio of the largest budget to the smallest that a target is looked for in."""

PRECISION = 1.03
"""Ratio of budgets at which the smallest that reaches a target counts as found."""


@dataclass(frozen=True)
class Plan:
    """The ranks that a search chose; `used` of the budget `allowed`, in its `unit`."""

    ranks: Mapping[str, int]
    used: float
    allowed: float
    unit: str


def pinned_ranks(
    ranks: Mapping[str, int], layers: Sequence[QuantizedLayer]
) -> dict[str, int]:
    """Ranks by layer that names or globs fix; the last that fits wins.

    Raises:
        CoRaError: One fits no layer, or a rank exceeds a layer's full rank.
    """
    pinned = by_layer("ranks", ranks, [layer.name for layer in layers])
    for layer in layers:
        rank = pinned.get(layer.name, 0)
        if rank > layer.full_rank:
            raise CoRaError(
                f"{layer.name}: rank {rank} exceeds its full rank {layer.full_rank}; "
                f"pass ranks={{{layer.name!r}: r}} with r <= {layer.full_rank}"
            )
    return pinned


class Planner:
    """Chooses ranks for layers, as often as budgets are asked for.

    Spectra and factors are computed once; a rank is a slice of them.

    Args:
        config: The settings.
        host: The prepared host.
        layers: All its layers.
        pinned: Ranks by layer that are not to be chosen.
        statistics: Of the layers that are not pinned to rank 0.
        images: What a search that learns may look at, each [n, …].
    """

    def __init__(
        self,
        config: CoRaConfig,
        host: Host,
        layers: Sequence[QuantizedLayer],
        pinned: Mapping[str, int],
        statistics: Mapping[str, LayerStatistics],
        images: Sequence[Tensor],
    ) -> None:
        self._config = config
        self._layers = layers
        self._pinned = pinned
        self._statistics = statistics
        self.targets = [e for e in layers if e.name in statistics]
        self.layers = {layer.name: layer for layer in self.targets}
        self.unit = "bits" if config.budget.is_target else config.budget.unit
        self.sweep: list[SweepPoint] = []
        self.network = Network(
            host, self.targets, pinned, lambda e: self.factors[e.name], images, 1.0
        )

    @cached_property
    def spectra(self) -> Mapping[str, tuple[float, ...]]:
        """The error that each further rank of a layer would remove, by layer."""
        return {
            e.name: tuple(
                removed_error(
                    e.matrices, self._statistics[e.name].observed(e, self._config)
                ).tolist()
            )
            for e in self.targets
        }

    @cached_property
    def factors(self) -> Mapping[str, Factors]:
        """The residuals' factors, by layer."""
        return {
            e.name: Factors.of(e.residual, e.operation, self.metric(e), e.name)
            for e in self.targets
        }

    def metric(self, layer: QuantizedLayer) -> Weighting:
        """The metric that a layer's factors are optimal in."""
        return self._statistics[layer.name].metric(layer, self._config)

    @property
    def sensitivities(self) -> Mapping[str, Tensor | None]:
        """Curvatures of the loss at the outputs, where they were collected."""
        return {name: each.sensitivity for name, each in self._statistics.items()}

    def adapters(self, ranks: Mapping[str, int]) -> dict[str, Adapter]:
        """The adapters of some ranks, by layer; none where the rank is 0."""
        bits = self._config.adapter_bits
        factors = {**self.factors, **self.network.trained}
        return {
            name: factors[name].adapter(rank, bits, name)
            for name, rank in ranks.items()
            if rank
        }

    def plan(self, guard: Guard) -> Plan:
        """Choose ranks that hold the budget, or the smallest that reaches a target.

        Raises:
            CoRaError: The budget buys nothing, or more than there is.
        """
        budget = self._config.budget
        for amount in self._config.sweep:
            self._measure(Budget(amount, self.unit), guard)
        if budget.is_target:
            return self._reach(budget, guard)
        return self._within(budget)

    def _within(self, budget: Budget) -> Plan:
        """Ranks that cost at most a budget."""
        allowed = self._allowance(budget)
        spent = sum(self._cost(name, rank) for name, rank in self._pinned.items())
        _check_budget(budget, self._candidates, spent, allowed, self._most)
        self.network.unit = allowed / budget.amount
        chosen = strategy(self._config, self.network)(self._candidates, allowed - spent)
        ranks = {**self._pinned, **chosen}
        used = sum(self._cost(name, rank) for name, rank in ranks.items())
        return Plan(ranks, used, allowed, budget.unit)

    def _reach(self, target: Budget, guard: Guard) -> Plan:
        """The smallest budget, in equivalent bits, whose adapters reach a target."""
        if target.reached_by(guard.before):
            return Plan(dict.fromkeys(self._statistics, 0), 0, 0, self.unit)
        whole = self._most / self._allowance(Budget(1, self.unit))
        best, distance = self._measure(Budget(whole, self.unit), guard)
        if not target.reached_by(distance):
            raise CoRaError(
                f"budget: {target} is out of reach: every residual whole, "
                f"+{whole:.3g} bits a weight, ends at a KL divergence of "
                f"{distance.kl:.4g} and {distance.agreement:.1%} agreement; ask for "
                "less, or quantize activations more finely"
            )
        low, high = whole / RANGE, whole
        while high / low > PRECISION:
            middle = math.sqrt(low * high)
            try:
                plan, distance = self._measure(Budget(middle, self.unit), guard)
            except CoRaError:  # It buys no adapter.
                low = middle
                continue
            if target.reached_by(distance):
                best, high = plan, middle
            else:
                low = middle
        return best

    def _measure(self, budget: Budget, guard: Guard) -> tuple[Plan, Divergence]:
        """Try a budget on the held-out images, and note what came of it."""
        plan = self._within(budget)
        adapters = self.adapters(plan.ranks)
        distance = guard.trial(merged_weights(self.targets, adapters))
        weights = sum(layer.weight.numel() for layer in self._layers)
        bits = stored_bits(self._layers, adapters.values())
        self.sweep.append(
            SweepPoint(
                str(budget),
                bits / weights,
                sum(adapter.parameters for adapter in adapters.values()),
                distance.kl,
                distance.agreement,
            )
        )
        return plan, distance

    def _allowance(self, budget: Budget) -> float:
        # A layer that is left alone was not observed; it counts with its parameters and
        # bits, and its share of the MACs is not offered to the others.
        counted = self.targets if budget.unit == "macs" else self._layers
        return allowance(budget, counted, self._positions)

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        return {name: each.outputs for name, each in self._statistics.items()}

    def _cost(self, name: str, rank: int) -> float:
        if not rank:
            return 0
        layer, bits = self.layers[name], self._config.adapter_bits
        return adapter_cost(layer, rank, bits, self._positions[name]).of(self.unit)

    @cached_property
    def _most(self) -> float:
        """Cost of every residual whole, of pinned layers too."""
        return sum(self._cost(e.name, e.full_rank) for e in self.targets)

    @cached_property
    def _candidates(self) -> Sequence[Candidate]:
        found = []
        for layer in self.targets:
            if layer.name in self._pinned:
                continue
            total = [0.0]
            for gain in self.spectra[layer.name]:
                total.append(total[-1] + gain)
            ranks, costs = ladder(
                layer, self._config.adapter_bits, self._positions[layer.name]
            )
            found.append(
                Candidate(
                    layer.name,
                    ranks,
                    tuple(cost.of(self.unit) for cost in costs),
                    tuple(total[rank] for rank in ranks),
                )
            )
        return found


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


def _check_budget(
    budget: Budget,
    candidates: Sequence[Candidate],
    spent: float,
    allowed: float,
    most: float,
) -> None:
    """Refuse a budget that nothing fits in, or that nothing could use up.

    `most` is the cost of every residual whole, of pinned layers too: pinned ranks may
    leave some of a budget unspent.
    """
    scale = budget.amount / allowed
    if spent > allowed:
        raise CoRaError(
            f"budget: the pinned ranks alone cost {spent * scale:.4g} {budget.unit}, "
            f"more than {budget}; lower the ranks or raise the budget"
        )
    if allowed > most * (1 + 1e-9):
        raise CoRaError(
            f"budget: {budget} is more than there is to buy; every residual whole "
            f"costs {most * scale:.4g} {budget.unit}"
        )
    least = min((c.costs[1] for c in candidates), default=0)
    if not spent and least > allowed:
        raise CoRaError(
            f"budget: {budget} buys no adapter; the cheapest costs "
            f"{least * scale:.4g} {budget.unit}"
        )
