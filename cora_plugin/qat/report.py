"""What a training did: figures as text, JSON and a picture."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cora_plugin.adapters.files import whole_file
from cora_plugin.guard import Step
from cora_plugin.objective import Distance
from cora_plugin.plot import plot_transitions
from cora_plugin.qat.record import Transitional


@dataclass(frozen=True)
class Measured:
    """The model on the held-out images after a number of steps."""

    step: int
    loss: float
    distance: float
    top1: float | None


@dataclass(frozen=True)
class QATReport:
    """The report of `finetune`.

    Attributes:
        settings: The settings it ran with.
        before: The distance from the float model on held-out images before.
        after: Afterwards, of the model as it is left.
        top1: The share of held-out images of the right class, before and after.
        verdict: How the trained model was judged, and whether it was kept.
        transitions: What was measured step by step and layer by layer.
        measured: The held-out images in the course of training.
        losses: The mean training loss of each step.
        epochs: Passes over the data, in part.
        stopped: Whether it stopped early.
        norms: What was done with batch norms.
        adapters: What was done with adapters.
        notes: How outputs were read.
        seconds: Seconds it took, those before an interruption included.
        overhead: Share of them that counting transitions took.
    """

    settings: dict[str, Any]
    before: Distance
    after: Distance
    top1: tuple[float | None, float | None]
    verdict: Step
    transitions: Transitional
    measured: tuple[Measured, ...]
    losses: tuple[float, ...]
    epochs: float
    stopped: bool
    norms: str
    adapters: str
    notes: tuple[str, ...]
    seconds: float
    overhead: float

    @property
    def kept(self) -> bool:
        """Whether the model is the trained one."""
        return self.verdict.kept

    def __str__(self) -> str:
        """A few lines."""
        steps = self.transitions.steps
        lines = [
            f"{self.settings['method']}: {len(steps)} steps, {self.epochs:.3g} epochs, "
            f"{self.seconds:.0f} s ({self.overhead:.1%} of them counting transitions)"
            + (", stopped early" if self.stopped else ""),
            f"{self.before} → {self.after}" + self._outcome(),
        ]
        if None not in self.top1:
            lines.append(f"top-1 {self.top1[0]:.2%} → {self.top1[1]:.2%} held out")
        if steps:
            last = steps[-1]
            target = "" if last.target is None else f", target {last.target:.2g}"
            lines.append(
                f"transition rate {last.running:.2g}{target}, "
                f"learning rate {last.lr:.2g} at the end"
            )
        shares = {
            "near a transition point": self.transitions.near,
            f"went back within {self.transitions.window} steps": (
                self.transitions.oscillating
            ),
        }
        known = [f"{v:.1%} {k}" for k, v in shares.items() if v is not None]
        if known:
            lines.append(f"weights at the end: {', '.join(known)}")
        if self.transitions.nonfinite:
            lines.append(
                f"{self.transitions.nonfinite} steps skipped: gradients not finite"
            )
        lines += [f"batch norms: {self.norms}", f"adapters: {self.adapters}"]
        lines += self.notes
        return "\n".join(lines)

    def _outcome(self) -> str:
        if not self.kept:
            return " (training was taken back, for it did not help)"
        if self.after.value > self.before.value:
            return " (kept, for the loss that was trained is lower, labels included)"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all."""
        with whole_file(path) as temporary:
            Path(temporary).write_text(json.dumps(self.to_dict()))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw rate, target and learning rate by step, and transitions by layer.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            FileError: The suffix is no format for pictures.
        """
        plot_transitions(self.transitions, path)
