"""Plans bit widths and adapters together, in one budget of everything that is stored.

The prediction of the search is of second order: it misleads where errors are large. So
plans from several menus of widths, with adapters and without, are tried on the held-out
images. What the regression behind it gains differs from kind to kind of plan, and is
nothing without adapters: where that can decide, the best of each kind are tried behind
it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import BudgetError, DataError
from cora_plugin.algorithm import checked_layers, ordinary_tensors
from cora_plugin.budget import total_bits
from cora_plugin.config import AnyConfig, CoRaConfig
from cora_plugin.config.declared import Bounds
from cora_plugin.fitting import Regression, Walk, own_shifts
from cora_plugin.guard import Guard
from cora_plugin.host import Host
from cora_plugin.items import Reader, check_loader
from cora_plugin.layer import QuantizedLayer, by_layer
from cora_plugin.objective import Distance, Objective, decide_on
from cora_plugin.plan import merged_weights
from cora_plugin.processes import agreeing
from cora_plugin.progress import bar
from cora_plugin.statistics import Collector
from cora_plugin.typed import check
from cora_plugin.width_plan import Trial, WidthPlan, fingerprint
from cora_plugin.width_search import Chosen, WidthSearch

NARROWEST = 4
"""Menus that begin here are tried beside those that begin below: predictions of what 2
and 3 bits do are the least certain."""

WIDTHS = Bounds(least=2, greatest=8)
"""Widths that a pinned layer may be given in place of its own."""

CLOSE = 2.0
"""How many times the least distance another kind of plan may have and yet end nearer,
if both have adapters: the regression about halves distances."""


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
        ConfigError: The budget is no total.
        BudgetError: It is less than the least that can be stored.
        ModelError: The host cannot quantize at a width of the menu.
    """
    settings = CoRaConfig.of(config)
    settings.budget.check_total()
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
        search = WidthSearch(settings, host, layers, statistics, _fixed(pinned, layers))
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


_Found = tuple[Trial, Chosen]


def _tried(
    search: WidthSearch, trials: "_Trials", config: CoRaConfig
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
        same = [t for t, e in found if e.treatments == chosen.treatments]
        if any((t.menu, t.adapters) == (menu, adapters) for t in same):
            continue  # Whether rounding is counted makes no difference here.
        distance = same[0].distance if same else trials.closed_form(chosen)
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

    def closed_form(self, chosen: Chosen) -> Distance:
        """The distance with the adapters that the search has seen, biases corrected."""
        shifts = own_shifts(chosen.layers, chosen.adapters, self._means)
        return self._distance(chosen, chosen.adapters, shifts)

    def regressed(self, chosen: Chosen) -> Distance:
        """The distance behind the regression of its adapters."""
        config = self._config
        walk = Walk.sampled(self._host, chosen.layers, self._split, config)
        forms = {n: e.forms for n, e in chosen.treatments.items() if e.forms}
        found = Regression(walk, forms, self._sensitivities, config)()
        return self._distance(chosen, *found)

    def _distance(
        self,
        chosen: Chosen,
        adapters: Mapping[str, Adapter],
        shifts: Mapping[str, Tensor],
    ) -> Distance:
        weights = {e.name: e.dequantized for e in chosen.layers}
        weights |= merged_weights(chosen.layers, adapters)
        return self._guard.trial(weights, shifts)
