"""The report of a run: what was done, what it cost and what it gained."""

import html
import io
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.files import whole_file
from cora_plugin.budget import stored_bits
from cora_plugin.guard import Judged, Step
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Distance
from cora_plugin.plain import plain
from cora_plugin.strict import strict_json


class Stopwatch:
    """Wall time by stage, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


def _metric(step: Step) -> str:
    if step.metric is None:
        return ""
    before, after = step.metric
    return f", metric {before:.4g} -> {after:.4g}"


@dataclass(frozen=True)
class LayerReport:
    """One layer. Errors are `tr(G E R Eᵀ)` in the statistics that were collected.

    `weight_bits` is the bit width of its weight; `bits` counts weight and adapter with
    their scales, a weight.
    `spectrum` holds the error that each further rank would remove, descending.
    """

    name: str
    kind: str
    rank: int
    full_rank: int
    weights: int
    parameters: int
    adapter_bits: int
    bits: float
    macs: int
    error_before: float
    error_after: float
    spectrum: tuple[float, ...] = ()
    weight_bits: float = 0.0

    @property
    def raised(self) -> bool:
        """Whether the adapter raises the layer's own error.

        A regression may, to lower the error that arrives from the layers before.
        """
        return self.error_after > self.error_before


@dataclass(frozen=True)
class SweepPoint:
    """Size of the adapters of one budget, and the distance on held-out images."""

    budget: str
    equivalent_bits: float
    parameters: int
    distance: Distance

    @property
    def kl(self) -> float:
        """The KL divergence in nats."""
        return self.distance.kl

    @property
    def agreement(self) -> float | None:
        """Share of the images whose class is the float model's."""
        return self.distance.agreement


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How much weights and adapters take to store.

    `equivalent_bits` is all stored bits of quantized weights and adapters, scales and
    zero points included, over the number of quantized weights; biases are not counted.
    """

    equivalent_bits_before: float
    equivalent_bits: float
    bytes: int
    adapter_parameters: int

    @classmethod
    def of(
        cls, layers: Sequence[QuantizedLayer], adapters: Collection[Adapter]
    ) -> "Stored":
        """Count layers with their adapters."""
        weights = sum(layer.weight.numel() for layer in layers)
        bits = stored_bits(layers, adapters)
        return cls(
            equivalent_bits_before=stored_bits(layers, ()) / weights,
            equivalent_bits=bits / weights,
            bytes=round(bits / 8),
            adapter_parameters=sum(adapter.parameters for adapter in adapters),
        )


@dataclass(frozen=True, kw_only=True)
class Spent:
    """How much of the budget was spent, in its unit, and results of other budgets."""

    budget_used: float
    budget_allowed: float
    budget_unit: str
    sweep: tuple[SweepPoint, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Images that calibrated, seconds by stage, and the effort of learning steps.

    `search_iterations` and `search_images` count those of a learning search,
    `fit_iterations` and `fit_images` those of the refinement.
    """

    images: int
    search_iterations: int = 0
    search_images: int = 0
    fit_iterations: int = 0
    fit_images: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Judged, Stored, Spent, Effort):
    """The whole result of one run of CoRa: its parts, and a row a layer.

    `notes` tell how data and outputs were read.
    """

    config: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str]
    plan: Mapping[str, Any] | None = None
    """How bit widths were planned, where they were: `WidthPlan.to_dict`."""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_parts(
        cls,
        config: Mapping[str, Any],
        layers: tuple[LayerReport, ...],
        skipped: Mapping[str, str],
        plan: Mapping[str, Any] | None,
        notes: tuple[str, ...],
        *parts: Judged | Stored | Spent | Effort,
    ) -> "Report":
        """Put the parts together."""
        fields = {name: value for part in parts for name, value in vars(part).items()}
        return cls(
            config=config,
            layers=layers,
            skipped=skipped,
            plan=plan,
            notes=notes,
            **fields,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all."""
        with whole_file(path) as temporary:
            Path(temporary).write_text(strict_json(self.to_dict()))

    def __repr__(self) -> str:
        """One line: the whole is `str`."""
        bits = f"{self.equivalent_bits_before:.2f} -> {self.equivalent_bits:.2f} bits"
        moved = f"{self.before} -> {self.after}"
        return f"<Report: {len(self.layers)} layers, {moved}, {bits}>"

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        """A table of the layers and the totals."""
        text = io.StringIO()
        console = Console(width=108, file=text)
        console.print(self._table())
        for line in self._summary():
            console.print(line, highlight=False, markup=False)
        return text.getvalue()

    def _table(self) -> Table:
        table = Table("layer", "adapter", title="CoRa")
        headings = ("width", "rank", "of", "parameters", "bits", "error", "after")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.layers:
            table.add_row(
                plain(row.name),
                row.kind,
                f"{row.weight_bits:g}",
                str(row.rank),
                str(row.full_rank),
                f"{row.parameters:,}",
                f"{row.bits:.2f}",
                f"{row.error_before:.3g}",
                f"{row.error_after:.3g}{'*' if row.raised else ''}",
            )
        return table

    def _summary(self) -> list[str]:
        unit = self.after.title
        lines = [f"left alone: {name}: {why}" for name, why in self.skipped.items()]
        lines += self.notes
        if any(row.raised for row in self.layers):
            lines.append(
                "* higher than without the adapter, which lowers what arrives from the "
                "layers before, too"
            )
        lines += self._planned(unit)
        for step in self.steps:
            verdict = "kept" if step.kept else "rolled back: it did not help"
            lines.append(
                f"{step.name}: {unit} {step.before.value:.4g} -> "
                f"{step.after.value:.4g} on {self.held_out} held-out images "
                f"({step.change} on {step.images}){_metric(step)}, {verdict}"
            )
        if self.search_iterations:
            lines.append(
                f"ranks learned in {self.search_iterations} iterations on "
                f"{self.search_images} images"
            )
        if self.fit_iterations:
            lines.append(
                f"refined in {self.fit_iterations} iterations on {self.fit_images} "
                "images"
            )
        for point in self.sweep:
            lines.append(
                f"with {point.budget}: {point.equivalent_bits:.3f} bits a weight, "
                f"{point.distance}"
            )
        alone = self.activations.value
        floor = f"quantized activations alone: {unit} {alone:.4g}"
        if not self.config["regression"] and alone > self.after.value / 2:
            floor += ", most of what is left; regression=true answers for them, too"
        lines.append(floor)
        spent = (
            f"{self.budget_used:,.0f} of {self.budget_allowed:,.0f} "
            f"{self.budget_unit} spent for the budget {self.config['budget']}"
        )
        if self.config["search"] == "series":
            terms, bits = self.config["terms"], self.config["adapter_bits"]
            spent = f"{terms} x {bits} bits beside each layer, whatever the budget"
        planned = "" if self.plan is None else " at the planned widths alone"
        lines += [
            f"{unit} to float {self.before.value:.4g}{planned} -> "
            f"{self.after.value:.4g}{self._decibels()}{self._agreement()} "
            f"({self.images} images calibrated, {self.held_out} held out)",
            f"{self.equivalent_bits_before:.3f} -> {self.equivalent_bits:.3f} bits a "
            f"weight, {self.bytes:,} bytes; {self.adapter_parameters:,} adapter "
            f"parameters; {spent}",
            "seconds: "
            + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()),
        ]
        return lines

    def _planned(self, unit: str) -> list[str]:
        """What bit widths were tried, the chosen ones first."""
        if self.plan is None:
            return []
        lines = []
        for trial in self.plan["trials"]:
            menu = "/".join(map(str, trial["menu"])) or "the toolkit's widths"
            adapters = "with adapters" if trial["adapters"] else "without adapters"
            if trial["rounding"]:
                adapters += " (their rounding counted)"
            if trial.get("regressed"):
                adapters += " and their regression"
            lines.append(
                f"tried {menu} {adapters}: {unit} {trial['value']:.4g} on held-out "
                f"images, {trial['bits']:.3f} bits a weight"
            )
        lines.append(
            f"0.1 bits a weight more would take {self.plan['next_tenth']:.0%} of the "
            "predicted error away"
        )
        return lines

    def _decibels(self) -> str:
        before, after = self.before.decibels, self.after.decibels
        if before is None or after is None:
            return ""
        return f" ({before:.1f} -> {after:.1f} dB)"

    def _agreement(self) -> str:
        before, after = self.before.agreement, self.after.agreement
        if before is None or after is None:
            return ""
        return f", agreement {before:.1%} -> {after:.1%}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw ranks and residual spectra by layer (needs the `report` extra)."""
        from cora_plugin.plot import plot_report

        plot_report(self, path)

    def plot_plan(self, path: str | os.PathLike[str]) -> None:
        """Draw the bit widths that were tried (needs the `report` extra)."""
        from cora_plugin.plot import plot_plan

        plot_plan(self, path)

    def plot_sweep(self, path: str | os.PathLike[str]) -> None:
        """Draw KL against bits for all budgets tried (needs the `report` extra)."""
        from cora_plugin.plot import plot_sweep

        plot_sweep(self, path)
