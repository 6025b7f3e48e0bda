"""Chooses bit widths and adapters for a budget, by the errors that are predicted.

The error that a layer at b bits leaves, `tr(G E_b R E_bᵀ)`, is in one unit for all
layers and widths, and what rank r of its residual removes of it, too. So a layer's
options are points of stored bits and error, and one greedy search goes over all hulls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from cora_plugin.adapters import Adapter, Form
from cora_plugin.adapters.errors import BudgetError
from cora_plugin.budget import forms, total_bits
from cora_plugin.config import CoRaConfig
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.plan import pinned_ranks
from cora_plugin.residuals import Residuals
from cora_plugin.search import Candidate, Option, Treatment, spectral
from cora_plugin.width_plan import Trial

CURVE = tuple(0.8 + 0.05 * step for step in range(13))
"""Budgets of a plan's curve, as multiples of its own."""


@dataclass(frozen=True)
class Chosen:
    """What a search chose: layers at their widths, treatments, bits, error left."""

    layers: Sequence[QuantizedLayer]
    treatments: Mapping[str, Treatment]
    adapters: Mapping[str, Adapter]
    bits: float
    left: float

    @property
    def widths(self) -> dict[str, float]:
        """The bit width of each layer."""
        return {layer.name: layer.weight_bits for layer in self.layers}


class WidthSearch:
    """The layers at every width, and the search among them.

    Args:
        config: The settings, with a menu of widths.
        host: The prepared host, which quantizes the layers at each.
        layers: They as they are.
        statistics: What `Collector.finish` returned.
        fixed: Widths that are not chosen, by layer name; None is the layer's own.

    Raises:
        ModelError: The host cannot quantize a layer at a width.
    """

    def __init__(
        self,
        config: CoRaConfig,
        host: Host,
        layers: Sequence[QuantizedLayer],
        statistics: Mapping[str, Any],
        fixed: Mapping[str, int | None],
    ) -> None:
        self._config = config
        self._layers = layers
        self._fixed = fixed
        self._forms = {
            e.name: forms(e, config.adapter_bits, config.term_bits) for e in layers
        }
        for name, rank in pinned_ranks(config.ranks, layers).items():
            pinned = [form for form in self._forms[name] if form.rank == rank]
            self._forms[name] = tuple(pinned)
        self._costs = {
            name: [(form, form.cost().bits) for form in found]
            for name, found in self._forms.items()
        }
        self.weights = sum(layer.weight.numel() for layer in layers)
        self._at: dict[int | None, Residuals] = {
            None: Residuals(config, layers, statistics)
        }
        others = {width for width in fixed.values() if width is not None}
        for width in sorted({*config.widths, *others}):
            floats = {
                e.name: e.weight for e in layers if fixed.get(e.name, width) == width
            }
            made = host.quantize(floats, dict.fromkeys(floats, width))
            wide = [
                replace(e, dequantized=made[e.name], weight_bits=float(width))
                if e.name in made
                else e
                for e in layers
            ]
            self._at[width] = Residuals(config, wide, statistics)
        self._allowed = total_bits(config.budget, layers)
        self._known: dict[
            tuple[int, int | None, bool], Mapping[Form | None, float]
        ] = {}
        self._shares: dict[int, float] = {}
        self._made: dict[tuple[int, int | None, Form], Adapter] = {}

    @property
    def sensitivities(self) -> Mapping[str, Tensor | None]:
        """Curvatures at the layers' outputs."""
        return self._at[None].sensitivities

    def __call__(self, menu: tuple[int, ...], adapters: bool, rounding: bool) -> Chosen:
        """Choose from a menu.

        Raises:
            BudgetError: Its least is more than the budget.
        """
        offer = self._offer(menu, adapters, rounding)
        treatments, bits, left = self._spent(offer, self._allowed)
        layers, made = [], {}
        for index, layer in enumerate(self._layers):
            treatment = treatments[layer.name]
            width = treatment.weight_bits
            layers.append(self._at[width].layers[index])
            for form in treatment.forms:
                made[layer.name] = self._adapter(index, width, form)
        return Chosen(layers, treatments, made, bits, left)

    def _offer(self, menu: tuple[int, ...], adapters: bool, rounding: bool) -> "_Offer":
        """What a menu has for each layer, whatever the budget."""
        candidates, least, errors = [], 0.0, 0.0
        for index, layer in enumerate(self._layers):
            points = self._points(index, menu, adapters, rounding)
            first = points[0]
            least += first.cost
            errors += first.left
            options = tuple(
                Option(e.treatment, round(e.cost - first.cost), first.left - e.left)
                for e in points
            )
            candidates.append(Candidate(layer.name, options))
        return _Offer(menu, candidates, least, errors)

    def _spent(
        self, offer: "_Offer", allowed: float
    ) -> tuple[Mapping[str, Treatment], float, float]:
        """What is chosen for so many bits, the bits a weight, the error left.

        Raises:
            BudgetError: The least of the menu is more.
        """
        least = offer.least
        if least > allowed * (1 + 1e-9):
            raise BudgetError(
                f"budget: {self._config.budget} is "
                f"{self._allowed / self.weights:.4g} bits a weight, and the least "
                f"that the menu {list(offer.menu) or 'of the host'} stores is "
                f"{least / self.weights:.4g}; raise the budget, or add narrower widths"
            )
        taken = spectral(offer.candidates, allowed - least)
        spent = sum(option.cost for option in taken.values())
        treatments = {name: option.treatment for name, option in taken.items()}
        left = offer.errors - sum(option.gain for option in taken.values())
        return treatments, (least + spent) / self.weights, left

    def next_tenth(self, trial: Trial) -> float:
        """The share of a trial's predicted error that 0.1 bits more would remove."""
        if not trial.predicted:
            return 0.0
        offer = self._offer(trial.menu, trial.adapters, trial.rounding)
        _, _, left = self._spent(offer, self._allowed + 0.1 * self.weights)
        return 1 - left / trial.predicted

    def curve(self, trial: Trial) -> tuple[tuple[float, float], ...]:
        """Bits a weight and predicted error of budgets around, spent as a trial did."""
        offer = self._offer(trial.menu, trial.adapters, trial.rounding)
        points = []
        for times in CURVE:
            try:
                _, bits, left = self._spent(offer, times * self._allowed)
            except BudgetError:  # Less than can be stored.
                continue
            points.append((bits, left))
        return tuple(dict.fromkeys(points))

    def _points(
        self, index: int, menu: tuple[int, ...], adapters: bool, rounding: bool
    ) -> list["_Point"]:
        """A layer's options that none is cheaper and better than, cheapest first."""
        name = self._layers[index].name
        widths: tuple[int | None, ...] = menu or (None,)
        if name in self._fixed:
            widths = (self._fixed[name],)
        points = []
        for width in widths:
            layer = self._at[width].layers[index]
            left = self._left(index, width, rounding)
            points.append(_Point(layer.stored_bits, left[None], Treatment((), width)))
            if adapters:
                points += [
                    _Point(
                        layer.stored_bits + bits, left[form], Treatment((form,), width)
                    )
                    for form, bits in self._costs[name]
                ]
        points.sort(key=lambda each: (each.cost, each.left))
        kept: list[_Point] = []
        for point in points:
            if not kept or point.left < kept[-1].left:
                kept.append(point)
        return kept

    def _left(
        self, index: int, width: int | None, rounding: bool
    ) -> Mapping[Form | None, float]:
        """The error that each form leaves in a layer at a width; None: no adapter."""
        known = self._known.get((index, width, rounding))
        if known is not None:
            return known
        residuals = self._at[width]
        layer = residuals.layers[index]
        removed = [0.0, *accumulate(residuals.spectra[layer.name])]
        whole, lost = removed[-1], 0.0
        if rounding:
            lost = self._lost(index)
        found: dict[Form | None, float] = {None: whole}
        for form in self._forms[layer.name]:
            if form.factored:
                found[form] = whole - (1 - lost) * removed[form.rank]
            else:  # An error of rounding, spread evenly over that many steps.
                found[form] = whole / (2**form.bits - 1) ** 2
        self._known[index, width, rounding] = found
        return found

    def _lost(self, index: int) -> float:
        """The share of what factors remove that rounding them costs.

        Of the residual at the width that the host has, at one rank: at other widths
        both shrink alike.
        """
        if index in self._shares:
            return self._shares[index]
        self._shares[index] = 0.0
        layer, residuals = self._layers[index], self._at[None]
        removed = [0.0, *accumulate(residuals.spectra[layer.name])]
        factored = [form for form in self._forms[layer.name] if form.factored]
        if factored and removed[-1]:
            some = factored[len(factored) // 4]
            kept = removed[some.rank]
            after = residuals.error_after(layer, self._adapter(index, None, some))
            lost = (after - (removed[-1] - kept)) / kept
            self._shares[index] = min(max(lost, 0.0), 1.0)
        return self._shares[index]

    def _adapter(self, index: int, width: int | None, form: Form) -> Adapter:
        key = index, width, form
        if key not in self._made:
            residuals = self._at[width]
            factors = residuals.factors_of(residuals.layers[index])
            self._made[key] = factors.adapter_of((form,))
        return self._made[key]


@dataclass(frozen=True)
class _Offer:
    """The layers' options of a menu, what it stores at least, the error left then."""

    menu: tuple[int, ...]
    candidates: Sequence[Candidate]
    least: float
    errors: float


@dataclass(frozen=True)
class _Point:
    """An option: the bits that it stores, the error that it leaves."""

    cost: float
    left: float
    treatment: Treatment
