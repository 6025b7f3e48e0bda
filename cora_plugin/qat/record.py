"""What was measured while a model was trained, step by step and layer by layer."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One step of the optimizer.

    Attributes:
        step: Its number, from 1.
        target: The target rate `R`; None where rates are only measured.
        rate: The share of weights that changed their codes, `k`.
        running: The running rate `K`.
        lr: The step size `U` for the next step.
        near: The share of weights near a transition point; None where not measured.
        oscillating: The share that has gone back and forth; likewise.
    """

    step: int
    target: float | None
    rate: float
    running: float
    lr: float
    near: float | None = None
    oscillating: float | None = None


@dataclass(frozen=True)
class LayerRecord:
    """One latent weight over all steps.

    Attributes:
        name: Its layer.
        weights: Number of its values.
        transitions: How often codes changed, of all values and steps.
        rate: The share of values that changed in a step, on average.
        near: The share of values near a transition point at the end, if it is known.
        oscillating: The share that went back and forth lately, if it was watched.
    """

    name: str
    weights: int
    transitions: int
    rate: float
    near: float | None
    oscillating: float | None


@dataclass(frozen=True)
class Transitional:
    """The transitions of a training.

    Attributes:
        steps: Steps of the optimizer, those that were skipped left out.
        layers: By latent weight.
        skipped: Calls of the scheduler without a step of the optimizer before them.
        nonfinite: Steps that were skipped for gradients that are not finite.
        window: Weights that went back within so many steps oscillate; 0: not watched.
    """

    steps: tuple[StepRecord, ...]
    layers: tuple[LayerRecord, ...]
    skipped: int
    nonfinite: int
    window: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    @property
    def near(self) -> float | None:
        """The share of weights near a transition point at the end."""
        return self._share("near")

    @property
    def oscillating(self) -> float | None:
        """The share of weights that oscillate at the end."""
        return self._share("oscillating")

    def _share(self, field: str) -> float | None:
        shares = [getattr(layer, field) for layer in self.layers]
        if not shares or None in shares:
            return None
        sizes = [layer.weights for layer in self.layers]
        parts = (share * size for share, size in zip(shares, sizes, strict=True))
        return float(sum(parts) / sum(sizes))
