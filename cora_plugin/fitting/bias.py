"""Bias corrections: constants that are added to the outputs of layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters import Adapter
from cora_plugin.adapters.exact import exact, exact_device
from cora_plugin.adapters.quantized import quantize
from cora_plugin.budget import MERGED_BITS
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
            left = left - exact(adapters[layer.name].merged())
        matrices = layer.operation.matrices(left)  # [g, m/g, k]
        shift = matrices @ means[layer.name].unsqueeze(-1)  # [g, m/g, 1]
        found[layer.name] = shift.flatten().to(layer.weight)
    return found


def rounding_shift(layer: QuantizedLayer, adapter: Adapter, mean: Tensor) -> Tensor:
    """The shift [m] that undoes the mean error of an adapter's merge into 8 bits.

    Exports for int8 kernels run one weight `M = Wq + BA`, rounded to `Q(M)`: integers
    of 8 bits, symmetric around zero, with one scale an output channel. What the
    rounding adds to outputs has the mean `(Q(M) − M) E[u]`, which does not vanish where
    inputs are of one sign, as behind ReLUs; so the shift is `(M − Q(M)) E[u]`. Scaling
    a channel of M scales both alike: it holds whatever such exports merge into M.

    Args:
        layer: The layer, with the main weight that stands.
        adapter: Its adapter.
        mean: `E[u]` [g, k], the layer's mean input.
    """
    merged = exact(layer.dequantized) + exact(adapter.merged())
    error = merged - exact(quantize(merged, MERGED_BITS).dequantize())
    matrices = layer.operation.matrices(error)  # [g, m/g, k]
    shift: Tensor = matrices @ mean.to(matrices).unsqueeze(-1)  # [g, m/g, 1]
    return shift.flatten().float()


class OutputMatch:
    """Finds the shift that matches a layer's mean output to the float layer's.

    In a network of few bits, outputs are about `a` times the float ones plus noise. A
    gain does no harm between ReLUs, which are homogeneous, as long as means shrink with
    the signal. If means, most of them negative, were restored to full size beside a
    weaker signal, they would close the ReLUs, more so with depth. So the shift makes
    the mean `a E[y]`, with `a` the gain of the layer, `Σ Cov(y, ŷ) / Σ Var(y)` over
    channels, within 0 to 1.

    Behind the last ReLUs nothing is homogeneous, and there a mean may belong at its
    full size: `whole_shift` makes it `E[y]`.
    """

    def __init__(self, layer: QuantizedLayer, weight: Tensor) -> None:
        self._layer = layer
        self._float, self._other = (
            layer.operation.matrices(exact(each)).mT for each in (layer.weight, weight)
        )  # [g, k, m/g]
        # Sums of y, ŷ, y² and y ŷ a channel.
        device = exact_device(weight.device)
        self._sums = torch.zeros(4, len(weight), dtype=torch.float64, device=device)
        self._rows = 0

    def update(self, _: int, u: Tensor, v: Tensor) -> None:
        """Add inputs at the same positions, [g, p, k], float and quantized."""
        y, other = u @ self._float, v @ self._other  # [g, p, m/g]
        each = torch.stack([y, other, y.square(), y * other])
        self._sums += each.sum(2).flatten(1)
        self._rows += y.shape[1]

    def pool(self) -> None:
        """Add what other processes have seen."""
        what = f"outputs of {self._layer.name}"
        (rows,) = processes.add_up(what, [self._sums], [self._rows])
        self._rows = int(rows)

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
        gain = self._gain(covariance)
        shift: Tensor = (gain * mean - other).to(self._layer.weight)
        return shift

    def whole_shift(self, mean: Tensor, other: Tensor) -> Tensor:
        """The shift [m] that restores means to full size, by the same means."""
        return (mean - other).to(self._layer.weight)

    def _gain(self, covariance: Tensor | float) -> Tensor | float:
        sampled, answer, square, product = self._sums / self._rows
        variance = (square - sampled.square()).sum()
        together = (product - sampled * answer + covariance).sum()
        return (together / variance).clamp(0, 1) if variance > 0 else 1.0

    def change(self, mean: Tensor, other: Tensor) -> Change:
        """A change by the shift alone."""
        return Change(
            self.shift(mean, other), whole_shift=self.whole_shift(mean, other)
        )


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
