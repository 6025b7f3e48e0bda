"""CoRa: layers → statistics → search → factors → insert → guard → report."""

import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from cora_plugin.adapters import Adapter, make_adapter
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import removed_error, weighted_error
from cora_plugin.adapters.operation import first_nonfinite
from cora_plugin.budget import adapter_cost, allowance, ladder
from cora_plugin.config import CoRaConfig
from cora_plugin.divergence import divergence, outputs
from cora_plugin.layer import Host, QuantizedLayer
from cora_plugin.report import LayerReport, Report, Step, Stopwatch
from cora_plugin.search import Candidate, Network, strategy
from cora_plugin.statistics import Collector, LayerStatistics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The ranks that a search chose, with what it looked at.

    `iterations` and `images` are those of a search that learns.
    """

    ranks: Mapping[str, int]
    spectra: Mapping[str, tuple[float, ...]]
    used: float
    allowed: float
    iterations: int
    images: int


def ordinary_tensors() -> AbstractContextManager[Any]:
    """Leave `torch.inference_mode`, whose tensors neither have gradients nor change."""
    if torch.is_inference_mode_enabled():
        return torch.inference_mode(False)
    return nullcontext()


class CoRa:
    """The algorithm that every host registers: residual adapters after PTQ.

    Args:
        config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = CoRaConfig.of(config)

    def apply(self, host: Host, loader: Iterable[Any]) -> Report:
        """Give a quantized model its adapters; after an error it is as it was.

        Args:
            host: The model inside its toolkit.
            loader: Calibration batches, images [N, …] or `(images, …)`, walked once.

        Raises:
            CoRaError: Something that the caller can change is wrong.
        """
        with ordinary_tensors(), host.prepared():
            run = self.start(host)
            for item in tqdm(loader, desc="moments", unit="batch", disable=None):
                run.update(item)
            return run.finish()

    def start(self, host: Host) -> "Run":
        """Begin on a prepared host; the caller feeds the images, batch by batch."""
        return Run(self.config, host)


class Run:
    """One application to one model: `update` with every batch, then `finish`."""

    def __init__(self, config: CoRaConfig, host: Host) -> None:
        self.config = config
        self._host = host
        self._watch = Stopwatch()
        with self._watch("layers"):
            self._layers = _checked(host)
            self._pinned = self._match_ranks()
        self._targets = [e for e in self._layers if self._pinned.get(e.name) != 0]
        if not self._targets:
            raise CoRaError(
                "ranks: every layer is pinned to rank 0, so there is nothing to do; "
                "leave the plugin off, or leave some layer free"
            )
        self._collector = Collector(host, self._targets, config)

    def update(self, item: Any) -> None:
        """Add a batch, images [N, …] or `(images, …)`."""
        with self._watch("statistics"):
            self._collector.update(item)

    def finish(self) -> Report:
        """Search, factor and insert; judge; report."""
        host, watch = self._host, self._watch
        with watch("statistics"):
            statistics = self._collector.finish()
        held_out = self._collector.split.held_out()
        with watch("guard"):
            with host.float_model():
                reference = outputs(host, held_out)
            before = divergence(reference, outputs(host, held_out))
        with watch("search"):
            plan = self._plan(statistics)
        with watch("factors"):
            adapters = self._factor(plan, statistics)
        with watch("insert"):
            host.insert(adapters)
        try:
            with watch("guard"):
                after = divergence(reference, outputs(host, held_out))
        except BaseException:
            host.remove()
            raise
        step = Step("adapters", before, after, after.kl <= before.kl)
        if not step.kept:
            host.remove()
            adapters = {}
            log.warning(
                "the adapters were taken out again: on %d held-out images they raised "
                "the KL divergence from %.4g to %.4g",
                len(reference),
                before.kl,
                after.kl,
            )
        with watch("report"):
            rows = tuple(
                self._row(layer, adapters.get(layer.name), plan, statistics)
                for layer in self._targets
            )
        alone = {n: "rank 0 was asked for" for n, r in self._pinned.items() if not r}
        weights = sum(layer.weight.numel() for layer in self._layers)
        main = sum(layer.stored_bits for layer in self._layers)
        added = sum(adapter.stored_bits for adapter in adapters.values())
        return Report(
            config=self.config.to_dict(),
            layers=rows,
            skipped={**host.skipped, **alone},
            steps=(step,),
            before=before,
            after=after if step.kept else before,
            equivalent_bits_before=main / weights,
            equivalent_bits=(main + added) / weights,
            bytes=round((main + added) / 8),
            adapter_parameters=sum(a.parameters for a in adapters.values()),
            budget_used=plan.used if step.kept else 0,
            budget_allowed=plan.allowed,
            images=self._collector.split.images,
            held_out=len(reference),
            search_iterations=plan.iterations,
            search_images=plan.images,
            seconds=watch.seconds,
        )

    def _match_ranks(self) -> dict[str, int]:
        """Ranks by layer that `config.ranks` fixes; the last pattern that fits wins."""
        pinned: dict[str, int] = {}
        for pattern, rank in self.config.ranks.items():
            layers = self._layers
            fitting = [e for e in layers if fnmatch.fnmatchcase(e.name, pattern)]
            if not fitting:
                names = ", ".join(layer.name for layer in layers)
                raise CoRaError(f"ranks: {pattern!r} fits no layer; they are {names}")
            for layer in fitting:
                if rank > layer.full_rank:
                    raise CoRaError(
                        f"{layer.name}: rank {rank} exceeds its full rank "
                        f"{layer.full_rank}; pass ranks={{{pattern!r}: r}} with "
                        f"r <= {layer.full_rank}"
                    )
                pinned[layer.name] = rank
        return pinned

    def _plan(self, statistics: Mapping[str, LayerStatistics]) -> Plan:
        """Choose ranks that hold the budget."""
        config, targets, pinned = self.config, self._targets, self._pinned
        unit, bits = config.budget.unit, config.adapter_bits
        # A layer that is left alone was not observed; it counts with its parameters and
        # bits, and its share of the MACs is not offered to the others.
        positions = {name: each.outputs for name, each in statistics.items()}
        counted = targets if unit == "macs" else self._layers
        allowed = allowance(config.budget, counted, positions)
        spectra, candidates, spent, most = {}, [], 0, 0
        for layer in targets:
            gains = removed_error(
                layer.matrices, statistics[layer.name].observed(layer, config)
            )
            spectra[layer.name] = tuple(gains.tolist())
            total = [0.0, *gains.cumsum(0).tolist()]
            here = positions[layer.name]
            most += adapter_cost(layer, layer.full_rank, bits, here).of(unit)
            if layer.name in pinned:
                spent += adapter_cost(layer, pinned[layer.name], bits, here).of(unit)
                continue
            ranks, costs = ladder(layer, bits, here)
            candidates.append(
                Candidate(
                    layer.name,
                    ranks,
                    tuple(cost.of(unit) for cost in costs),
                    tuple(total[rank] for rank in ranks),
                )
            )
        _check_budget(config, candidates, spent, allowed, most)
        network = Network(
            self._host,
            targets,
            pinned,
            lambda layer: statistics[layer.name].metric(layer, config),
            self._collector.split.sampled,
            allowed / config.budget.amount,
        )
        chosen = strategy(config, network)(candidates, allowed - spent)
        plan = {**pinned, **chosen}
        used = sum(
            adapter_cost(e, plan[e.name], bits, positions[e.name]).of(unit)
            for e in targets
        )
        return Plan(
            plan, spectra, used, allowed, network.iterations, len(network.shown)
        )

    def _factor(
        self, plan: Plan, statistics: Mapping[str, LayerStatistics]
    ) -> dict[str, Adapter]:
        config = self.config
        return {
            layer.name: make_adapter(
                layer.residual,
                layer.operation,
                plan.ranks[layer.name],
                statistics[layer.name].metric(layer, config),
                config.adapter_bits,
                layer.name,
            )
            for layer in self._targets
            if plan.ranks[layer.name]
        }

    def _row(
        self,
        layer: QuantizedLayer,
        adapter: Adapter | None,
        plan: Plan,
        statistics: Mapping[str, LayerStatistics],
    ) -> LayerReport:
        here = statistics[layer.name]
        spectrum = plan.spectra[layer.name]
        before = after = sum(spectrum)
        bits = layer.stored_bits
        macs = 0
        if adapter is not None:
            left = layer.residual - adapter.merged().double()
            matrices = layer.as_matrices(left)
            after = weighted_error(matrices, here.observed(layer, self.config))
            bits += adapter.stored_bits
            cost = adapter_cost(
                layer, adapter.rank, self.config.adapter_bits, here.outputs
            )
            macs = cost.macs
        return LayerReport(
            name=layer.name,
            kind="none" if adapter is None else str(adapter.kind),
            rank=0 if adapter is None else adapter.rank,
            full_rank=layer.full_rank,
            weights=layer.weight.numel(),
            parameters=0 if adapter is None else adapter.parameters,
            adapter_bits=0 if adapter is None else adapter.stored_bits,
            bits=bits / layer.weight.numel(),
            macs=macs,
            error_before=before,
            error_after=after,
            spectrum=spectrum,
        )


def _checked(host: Host) -> Sequence[QuantizedLayer]:
    """The host's layers, if they can be worked with."""
    layers = host.layers
    if not layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in host.skipped.items())
        raise CoRaError(
            "the model has no quantized layer that can carry an adapter "
            f"({reasons or 'nothing in it is quantized'}); quantize it with the "
            "toolkit first, and pass the quantized model"
        )
    for layer in layers:
        for what, weight in (
            ("float", layer.weight),
            ("quantized", layer.dequantized),
        ):
            kind = first_nonfinite(weight)
            if kind is not None:
                raise CoRaError(
                    f"{layer.name}: its {what} weight holds {kind}; mend the model "
                    "before it is quantized"
                )
    return layers


def _check_budget(
    config: CoRaConfig,
    candidates: Sequence[Candidate],
    spent: float,
    allowed: float,
    most: float,
) -> None:
    """Refuse a budget that nothing fits in, or that nothing could use up.

    `most` is the cost of every residual whole, of pinned layers too: pinned ranks may
    leave some of a budget unspent.
    """
    budget, scale = config.budget, config.budget.amount / allowed
    if spent > allowed:
        raise CoRaError(
            f"budget: the pinned ranks alone cost {spent * scale:.4g} {budget.unit}, "
            f"more than {budget}; lower the ranks or raise the budget"
        )
    if allowed > most:
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
