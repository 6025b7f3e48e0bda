"""What was done to a model, what it cost and what it brought."""

import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cora_plugin.adapters.files import whole_file
from cora_plugin.divergence import Divergence


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


@dataclass(frozen=True)
class LayerReport:
    """One layer. Errors are `tr(G E R Eᵀ)` in the statistics that were collected.

    `bits` counts the layer's weight and adapter with their scales, a weight.
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


@dataclass(frozen=True)
class Step:
    """A step that was judged on the held-out images, and whether it was kept."""

    name: str
    before: Divergence
    after: Divergence
    kept: bool


@dataclass(frozen=True)
class SweepPoint:
    """What the adapters of one budget bring on the held-out images."""

    budget: str
    equivalent_bits: float
    parameters: int
    kl: float
    agreement: float


@dataclass(frozen=True)
class Report:
    """The whole result of one run of CoRa.

    `equivalent_bits` is all stored bits of quantized weights and adapters, scales and
    zero points included, over the number of quantized weights; biases are not counted.
    `search_iterations` and `search_images` tell what a search that learns has used,
    `fit_iterations` and `fit_images` what a refinement has. `activations` is the
    divergence with float weights and quantized activations: what adapters that restore
    weights, and nothing else, can reach.
    """

    config: Mapping[str, Any]
    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str]
    before: Divergence
    after: Divergence
    activations: Divergence
    steps: tuple[Step, ...]
    equivalent_bits_before: float
    equivalent_bits: float
    bytes: int
    adapter_parameters: int
    budget_used: float
    budget_allowed: float
    budget_unit: str
    images: int
    held_out: int
    search_iterations: int = 0
    search_images: int = 0
    fit_iterations: int = 0
    fit_images: int = 0
    sweep: tuple[SweepPoint, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all."""
        with whole_file(path) as temporary:
            Path(temporary).write_text(json.dumps(self.to_dict(), indent=2))

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
        for heading in ("rank", "of", "parameters", "bits", "error", "after"):
            table.add_column(heading, justify="right")
        for row in self.layers:
            table.add_row(
                row.name,
                row.kind,
                str(row.rank),
                str(row.full_rank),
                f"{row.parameters:,}",
                f"{row.bits:.2f}",
                f"{row.error_before:.3g}",
                f"{row.error_after:.3g}",
            )
        return table

    def _summary(self) -> list[str]:
        lines = [f"left alone: {name}: {why}" for name, why in self.skipped.items()]
        for step in self.steps:
            verdict = "kept" if step.kept else "rolled back: it did not help"
            lines.append(
                f"{step.name}: KL {step.before.kl:.4g} -> {step.after.kl:.4g} on "
                f"{self.held_out} held-out images, {verdict}"
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
                f"with {point.budget}: {point.equivalent_bits:.3f} bits a weight, KL "
                f"{point.kl:.4g}, agreement {point.agreement:.1%}"
            )
        floor = f"quantized activations alone: KL {self.activations.kl:.4g}"
        if self.config["metric"] != "rrr" and self.activations.kl > self.after.kl / 2:
            floor += ", most of what is left; metric=rrr answers for them, too"
        lines.append(floor)
        budget = self.config["budget"]
        lines += [
            f"KL to float {self.before.kl:.4g} -> {self.after.kl:.4g}, agreement "
            f"{self.before.agreement:.1%} -> {self.after.agreement:.1%} "
            f"({self.images} images calibrated, {self.held_out} held out)",
            f"{self.equivalent_bits_before:.3f} -> {self.equivalent_bits:.3f} bits a "
            f"weight, {self.bytes:,} bytes; {self.adapter_parameters:,} adapter "
            f"parameters; {self.budget_used:,.0f} of {self.budget_allowed:,.0f} "
            f"{self.budget_unit} spent for the budget {budget}",
            "seconds: "
            + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()),
        ]
        return lines

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw ranks and residual spectra by layer (needs the `report` extra)."""
        from cora_plugin.plot import plot_report

        plot_report(self, path)

    def plot_sweep(self, path: str | os.PathLike[str]) -> None:
        """Draw KL against bits for all budgets tried (needs the `report` extra)."""
        from cora_plugin.plot import plot_sweep

        plot_sweep(self, path)
