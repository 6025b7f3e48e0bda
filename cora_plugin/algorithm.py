"""CoRa: layers → statistics → search → fitting → insert, guarded → report."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from tqdm import tqdm

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import weighted_error
from cora_plugin.adapters.operation import first_nonfinite
from cora_plugin.budget import adapter_cost, stored_bits
from cora_plugin.config import CoRaConfig
from cora_plugin.guard import Guard
from cora_plugin.layer import Host, QuantizedLayer
from cora_plugin.plan import Planner, pinned_ranks
from cora_plugin.report import LayerReport, Report, Stopwatch
from cora_plugin.statistics import Collector, LayerStatistics
from cora_plugin.steps import Steps


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
            self._pinned = pinned_ranks(config.ranks, self._layers)
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
        """Search, solve, insert and refine, each step guarded; report.

        After an error the model is as it was.
        """
        watch, config = self._watch, self.config
        with watch("statistics"):
            statistics = self._collector.finish()
        split = self._collector.split
        with watch("guard"):
            guard = Guard(self._host, split.held_out())
            activations = guard.trial({e.name: e.weight for e in self._layers})
        shown = split.sampled[: config.butterworth.images]
        planner = Planner(
            config, self._host, self._layers, self._pinned, statistics, shown
        )
        with watch("search"):
            plan = planner.plan(guard)
        steps = Steps(config, self._host, self._collector, planner, guard, watch)
        try:
            steps(plan.ranks)
        except BaseException:
            self._host.remove()
            raise
        kept = guard.kept
        with watch("report"):
            rows = tuple(
                self._row(layer, kept.adapters.get(layer.name), planner, statistics)
                for layer in self._targets
            )
        alone = {n: "rank 0 was asked for" for n, r in self._pinned.items() if not r}
        weights = sum(layer.weight.numel() for layer in self._layers)
        bits = stored_bits(self._layers, kept.adapters.values())
        return Report(
            config=config.to_dict(),
            layers=rows,
            skipped={**self._host.skipped, **alone},
            steps=tuple(guard.steps),
            before=guard.before,
            after=guard.now,
            activations=activations,
            equivalent_bits_before=stored_bits(self._layers, ()) / weights,
            equivalent_bits=bits / weights,
            bytes=round(bits / 8),
            adapter_parameters=sum(a.parameters for a in kept.adapters.values()),
            budget_used=plan.used if kept.adapters else 0,
            budget_allowed=plan.allowed,
            budget_unit=plan.unit,
            images=split.images,
            held_out=guard.images,
            search_iterations=planner.network.iterations,
            search_images=len(planner.network.shown),
            fit_iterations=steps.fit_iterations,
            fit_images=steps.fit_images,
            sweep=tuple(planner.sweep),
            seconds=watch.seconds,
        )

    def _row(
        self,
        layer: QuantizedLayer,
        adapter: Adapter | None,
        planner: Planner,
        statistics: Mapping[str, LayerStatistics],
    ) -> LayerReport:
        here = statistics[layer.name]
        spectrum = planner.spectra[layer.name]
        before = after = sum(spectrum)
        bits = layer.stored_bits
        macs = 0
        if adapter is not None:
            left = planner.layers[layer.name].residual - adapter.merged().double()
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
