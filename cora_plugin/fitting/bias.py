"""Bias corrections: constants that are added to the outputs of layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cora_plugin.adapters import Adapter
from cora_plugin.fitting.walk import Change, Walk
from cora_plugin.layer import QuantizedLayer


def own_shifts(
    layers: Sequence[QuantizedLayer],
    adapters: Mapping[str, Adapter],
    means: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Shifts that undo each layer's own mean error, `(W − Wq − BA) E[u]`.

    Args:
        layers: The layers, with the main weights that stand.
        adapters: Their adapters by name.
        means: `E[u]` [g, k] by name, of inputs that upstream errors do not reach.

    Returns:
        Shifts [m] by layer name.
    """
    found = {}
    for layer in layers:
        left = layer.residual
        if layer.name in adapters:
            left = left - adapters[layer.name].merged().double()
        matrices = layer.operation.matrices(left)  # [g, m/g, k]
        shift = matrices @ means[layer.name].unsqueeze(-1)  # [g, m/g, 1]
        found[layer.name] = shift.flatten().to(layer.weight.dtype)
    return found


class OutputMatch:
    """Finds the shift that matches a layer's mean output to the float layer's.

    In a network of few bits, outputs are about `a` times the float ones plus noise. A
    gain does no harm between ReLUs, which are homogeneous, as long as means shrink with
    the signal. If means, most of them negative, were restored to full size beside a
    weaker signal, they would close the ReLUs, more so with depth. So the shift makes
    the mean `a E[y]`, with `a` the gain of the layer, `Σ Cov(y, ŷ) / Σ Var(y)` over
    channels, within 0 to 1.
    """

    def __init__(self, layer: QuantizedLayer, weight: Tensor) -> None:
        self._layer = layer
        self._float, self._other = (
            layer.operation.matrices(each.double()).mT
            for each in (layer.weight, weight)
        )  # [g, k, m/g]
        # Sums of y, ŷ, y² and y ŷ a channel.
        self._sums = torch.zeros(4, len(weight), dtype=torch.float64).to(weight.device)
        self._rows = 0

    def update(self, _: int, u: Tensor, v: Tensor) -> None:
        """Add inputs at the same positions, [g, p, k], float and quantized."""
        y, other = u @ self._float, v @ self._other  # [g, p, m/g]
        each = torch.stack([y, other, y.square(), y * other])
        self._sums += each.sum(2).flatten(1)
        self._rows += y.shape[1]

    def shift(
        self,
        mean: Tensor,
        other: Tensor,
        covariance: Tensor | float = 0.0,
    ) -> Tensor:
        """The shift [m].

        Args:
            mean: `E[y]`, [m], over all positions.
            other: `E[ŷ]`, [m], likewise.
            covariance: What a new weight adds to `Cov(y, ŷ)`, [m].
        """
        sampled, answer, square, product = self._sums / self._rows
        variance = (square - sampled.square()).sum()
        together = (product - sampled * answer + covariance).sum()
        gain = (together / variance).clamp(0, 1) if variance > 0 else 1.0
        shift: Tensor = (gain * mean - other).to(self._layer.weight)
        return shift

    def change(self, mean: Tensor, other: Tensor) -> Change:
        """A change by the shift alone."""
        return Change(self.shift(mean, other))


def cascaded_shifts(walk: Walk, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Match each layer's mean output in the quantized network, front to back.

    Args:
        walk: The layers.
        weights: The main weights with their adapters, by layer name.

    Returns:
        Shifts [m] by layer name, each found with those before it in place.
    """

    def visitor(layer: QuantizedLayer) -> OutputMatch:
        return OutputMatch(layer, weights.get(layer.name, layer.dequantized))

    return {name: each.shift for name, each in walk(visitor, weights).items()}
