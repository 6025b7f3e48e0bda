"""Bias corrections: constants that are added to the outputs of layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.operation import positions
from cora_plugin.fitting.walk import Pair, Walk
from cora_plugin.layer import QuantizedLayer


def own_shifts(
    layers: Sequence[QuantizedLayer],
    adapters: Mapping[str, Adapter],
    means: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What the error of each layer alone takes from its mean: `(W − Wq − BA) E[u]`.

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
    """Which shift matches a layer's mean output to the float one, as far as it can be.

    A network of few bits passes on a weaker signal: its outputs are about `a` times the
    float ones plus noise. Layers between ReLUs hand such a gain on unharmed, for ReLU
    is homogeneous, as long as means shrink with the signal. Restored to their full size
    beside a weaker signal, the mostly negative means would close the ReLUs, the more
    the deeper. Hence the shift makes the mean `a E[y]`, with `a` the gain of the layer,
    `Σ Cov(y, ŷ) / Σ Var(y)` over channels, within 0 to 1.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        self._layer = layer
        # Sums of y, ŷ, y² and y ŷ a channel.
        self._sums = torch.zeros(4, layer.weight.shape[0], dtype=torch.float64)
        self._rows = 0

    def update(self, pair: Pair) -> None:
        """Add one run."""
        operation = self._layer.operation
        y, other = (
            positions(output, operation).transpose(1, 2).flatten(2).flatten(0, 1)
            for output in (pair.float_output.double(), pair.output.double())
        )  # [N·p, m]
        sums = torch.stack(
            [y.sum(0), other.sum(0), y.square().sum(0), (y * other).sum(0)]
        )
        self._sums = self._sums.to(sums) + sums
        self._rows += len(y)

    def shift(
        self, change: Tensor | None = None, covariance: Tensor | None = None
    ) -> Tensor:
        """The shift [m].

        Args:
            change: What a new weight adds to the mean of `ŷ`, [m].
            covariance: What it adds to `Cov(y, ŷ)`, [m].
        """
        mean, other, square, product = self._sums / self._rows
        variance = (square - mean.square()).sum()
        together = product - mean * other
        if change is not None and covariance is not None:
            other, together = other + change, together + covariance
        gain = (together.sum() / variance).clamp(0, 1) if variance > 0 else 1.0
        shift: Tensor = (gain * mean - other).to(self._layer.weight)
        return shift


def cascaded_shifts(walk: Walk, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Match each layer's mean output in the quantized network, front to back.

    Args:
        walk: The layers.
        weights: The main weights with their adapters, by layer name.

    Returns:
        Shifts [m] by layer name, each found with those before it in place.
    """
    shifts: dict[str, Tensor] = {}
    for layer in walk:
        match = OutputMatch(layer)
        for pair in walk.pairs(layer, weights, shifts):
            match.update(pair)
        shifts[layer.name] = match.shift()
    return shifts
