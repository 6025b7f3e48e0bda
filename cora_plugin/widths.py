"""Plans bit widths and adapters together, in one budget of everything that is stored.

The error that a layer at b bits leaves, `tr(G E_b R E_bᵀ)`, is in one unit for all
layers and widths, and what rank r of its residual removes of it, too. So a layer's
options are points of stored bits and error, and one greedy search goes over all hulls.

The prediction is of second order: it misleads where errors are large. So plans from
several menus of widths, with adapters and without, are tried on the held-out images.
What the regression behind it gains differs from kind to kind of plan, and is nothing
without adapters: where that can decide, the best of each kind are tried behind it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from cora_plugin.adapters import Adapter, Form
from cora_plugin.adapters.errors import BudgetError, DataError
from cora_plugin.algorithm import checked_layers, ordinary_tensors
from cora_plugin.budget import forms, total_bits
from cora_plugin.config import AnyConfig, CoRaConfig
from cora_plugin.config.declared import Bounds
from cora_plugin.fitting import Regression, Walk, own_shifts
from cora_plugin.guard import Guard
from cora_plugin.host import Host
from cora_plugin.items import Reader, check_loader
from cora_plugin.layer import QuantizedLayer, by_layer
from cora_plugin.objective import Distance, Objective, decide_on
from cora_plugin.plan import merged_weights, pinned_ranks
from cora_plugin.processes import agreeing
from cora_plugin.progress import bar
from cora_plugin.residuals import Residuals
from cora_plugin.search import Candidate, Option, Treatment, spectral
from cora_plugin.statistics import Collector
from cora_plugin.typed import check
from cora_plugin.width_plan import Trial, WidthPlan, fingerprint

NARROWEST = 4
"""Menus that begin here are tried beside those that begin below: predictions of what 2
and 3 bits do are the least certain."""

WIDTHS = Bounds(least=2, greatest=8)
"""Widths that a pinned layer may be given in place of its own."""

CLOSE = 2.0
"""How many times the least distance another kind of plan may have and yet end nearer,
if both have adapters: the regression about halves distances."""

CURVE = tuple(0.8 + 0.05 * step for step in range(13))
"""Budgets of a plan's curve, as multiples of its own."""


def plan_widths(
    host: Host,
    loader: Iterable[Any],
    config: AnyConfig = None,
    pinned: Mapping[str, int] | None = None,
    objective: Objective | None = None,
    unpack: Callable[[Any], Any] | None = None,
    keep: bool = False,
) -> WidthPlan:
    """Choose bit widths and adapters within a total budget; the model stays unchanged.

    Args:
        host: The quantized model inside its toolkit, its weights rounded plainly.
        loader: Calibration batches, images [N, …] or `(images, …)`, walked once.
        config: A `CoRaConfig` or anything that it reads, with a total `budget` and the
            `menu` of widths.
        pinned: The widths of some layers, by name or glob, which are not chosen.
        objective: What "near to the float model" means; None: as the config says.
        unpack: As for `CoRa.apply`.
        keep: Keep the statistics with the plan, for adapters with the same data and
            settings right after; they may take a GiB.

    Raises:
        BudgetError: The budget is no total, or less than the least that can be stored.
        ModelError: The host cannot quantize at a width of the menu.
    """
    settings = CoRaConfig.of(config)
    if not settings.budget.is_total:
        raise BudgetError(
            f"budget: {settings.budget} is no total; bit widths are planned in a "
            "budget of all that is stored, such as '4.1 bits total', '1.0 ptq' or "
            "'0.8 MiB'"
        )
    check_loader(loader)
    with ordinary_tensors(), host.prepared(), agreeing():
        layers = checked_layers(host)
        collector = Collector(host, layers, settings)
        reader = Reader.of(host.run, unpack)
        for item in bar(loader, "moments", "batch"):
            collector.update(reader(item))
        collector.close()
        held_out = collector.split.held_out()
        if objective is None:
            channels = collector.last_channels
            objective = decide_on(host, settings, held_out[0], channels).objective
        statistics = collector.finish(objective)
        for name, why in collector.unused.items():
            raise DataError(
                f"{name}: {why}, and bit widths are planned by it; calibrate with data "
                "that uses it, or take the layer out of what the toolkit quantizes"
            )
        guard = Guard(host, held_out, objective)
        search = _Widths(settings, host, layers, statistics, _fixed(pinned, layers))
        trials = _Trials(settings, host, collector, guard, search.sensitivities)
        found = _tried(search, trials, settings)
    first, best = found[0]
    own = {layer.name: layer.weight_bits for layer in layers}
    return WidthPlan(
        {n: int(b) for n, b in best.widths.items() if b != own[n]},
        best.widths,
        best.treatments,
        best.bits,
        total_bits(settings.budget, layers) / search.weights,
        tuple(trial for trial, _ in found),
        search.next_tenth(first),
        search.curve(first),
        {layer.name: fingerprint(layer) for layer in layers},
        collector if keep else None,
    )


def _fixed(
    pinned: Mapping[str, int] | None, layers: Sequence[QuantizedLayer]
) -> dict[str, int | None]:
    """The widths of pinned layers, by name; None where it is the layer's own.

    Raises:
        ConfigError: A layer is not there, or a width is out of range.
    """
    check(pinned or {}, Mapping[str, int], ("pinned",))
    found = by_layer("pinned", pinned or {}, [layer.name for layer in layers])
    own = {layer.name: layer.weight_bits for layer in layers}
    fixed = {name: None if bits == own[name] else bits for name, bits in found.items()}
    for name, bits in fixed.items():
        if bits is not None:
            WIDTHS.check(("pinned", name), bits)
    return fixed


_Found = tuple[Trial, "_Chosen"]


def _tried(
    search: "_Widths", trials: "_Trials", config: CoRaConfig
) -> Sequence[_Found]:
    """Plans from all menus, the one that ends nearest to float first."""
    found: list[_Found] = []
    for menu, adapters, rounding in bar(_menus(config.widths), "menus tried", "menu"):
        try:
            chosen = search(menu, adapters, rounding)
        except BudgetError:
            # Less than this menu stores: another one may have narrower widths.
            if menu == config.widths:
                raise
            continue
        same = [t.distance for t, e in found if e.treatments == chosen.treatments]
        distance = same[0] if same else trials.closed_form(chosen)
        how = menu, adapters, rounding
        found.append((Trial(*how, chosen.bits, chosen.left, distance), chosen))
    found.sort(key=_distance)
    finalists = _finalists(found) if config.regression else []
    for index in bar(finalists, "regressions tried", "plan"):
        trial, chosen = found[index]
        behind = trials.regressed(chosen)
        if behind.value < trial.distance.value:  # Else it would be taken back.
            found[index] = replace(trial, distance=behind, regressed=True), chosen
    return sorted(found, key=_distance)


def _distance(found: _Found) -> float:
    return found[0].distance.value


def _finalists(found: Sequence[_Found]) -> list[int]:
    """Which of the trials, nearest first, the regression may put in another order.

    The best with adapters at the host's own widths, and the best at others. None, if
    only the very best of all would be tried, or what is too far behind it.
    """
    kinds: dict[bool, int] = {}
    for index, (trial, chosen) in enumerate(found):
        if chosen.adapters:
            kinds.setdefault(bool(trial.menu), index)
    limit = CLOSE * _distance(found[0])
    if not found[0][1].adapters:  # It gains nothing, and they may gain nine tenths.
        limit = math.inf
    finalists = sorted(e for e in kinds.values() if _distance(found[e]) <= limit)
    return [] if finalists == [0] else finalists


def _menus(widths: tuple[int, ...]) -> list[tuple[tuple[int, ...], bool, bool]]:
    """The menus to try, each with adapters or without; that of the host is empty.

    What rounding adapters costs is counted or not: counting it spares plans of many
    ranks that look better than any can be, and makes others too timid.
    """
    wider = tuple(width for width in widths if width >= NARROWEST)
    ends = tuple(width for width in (4, 8) if width in widths)
    menus = dict.fromkeys([widths, *(e for e in (wider, ends) if e), ()])
    ways = ((True, False), (True, True), (False, False))
    return [(menu, *way) for menu in menus for way in ways]


@dataclass(frozen=True)
class _Chosen:
    """What a search chose: layers at their widths, treatments, bits, error left."""

    layers: Sequence[QuantizedLayer]
    treatments: Mapping[str, Treatment]
    adapters: Mapping[str, Adapter]
    bits: float
    left: float

    @property
    def widths(self) -> dict[str, float]:
        return {layer.name: layer.weight_bits for layer in self.layers}


class _Trials:
    """Tries plans on the held-out images; the model stays unchanged."""

    def __init__(
        self,
        config: CoRaConfig,
        host: Host,
        collector: Collector,
        guard: Guard,
        sensitivities: Mapping[str, Tensor | None],
    ) -> None:
        self._config = config
        self._host = host
        self._split = collector.split
        self._means = collector.means()
        self._guard = guard
        self._sensitivities = sensitivities

    def closed_form(self, chosen: _Chosen) -> Distance:
        """The distance with the adapters that the search has seen, biases corrected."""
        shifts = own_shifts(chosen.layers, chosen.adapters, self._means)
        return self._distance(chosen, chosen.adapters, shifts)

    def regressed(self, chosen: _Chosen) -> Distance:
        """The distance behind the regression of its adapters."""
        config, split = self._config, self._split
        images = split.together(config.sequential_images)
        walk = Walk(self._host, chosen.layers, images, config.positions, split.whole)
        forms = {n: e.forms for n, e in chosen.treatments.items() if e.forms}
        found = Regression(walk, forms, self._sensitivities, config)()
        return self._distance(chosen, *found)

    def _distance(
        self,
        chosen: _Chosen,
        adapters: Mapping[str, Adapter],
        shifts: Mapping[str, Tensor],
    ) -> Distance:
        weights = {e.name: e.dequantized for e in chosen.layers}
        weights |= merged_weights(chosen.layers, adapters)
        return self._guard.trial(weights, shifts)


class _Widths:
    """The layers at every width, and the search among them."""

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

    def __call__(
        self, menu: tuple[int, ...], adapters: bool, rounding: bool
    ) -> _Chosen:
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
        return _Chosen(layers, treatments, made, bits, left)

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
