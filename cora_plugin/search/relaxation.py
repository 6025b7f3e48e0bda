"""The relaxed network of CoRa's search: Butterworth kernels, and the loss of cutoffs.

Every layer has a normalised cutoff `ρ` in [1/K, 1], K its full rank. A Butterworth
kernel damps both factors of singular value i by `t_i`, which makes the rank a
differentiable matter (arXiv 2408.00923).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cora_plugin.adapters import Factors
from cora_plugin.layer import QuantizedLayer
from cora_plugin.outputs import Outputs


def log_response(ratio: Tensor, order: float) -> Tensor:
    """Log of the Butterworth power `1 / (1 + ratio^(2·order))`, which is ½ at 1."""
    # As a sigmoid it neither overflows nor loses its gradient, whatever the order.
    return F.logsigmoid(-2 * order * ratio.log())


def kernel(cutoff: Tensor, full_rank: int, order: float) -> Tensor:
    """What is left of each singular value, `t_i²` for i = 1 … K, over its maximum.

    `t_i = 1 / √(1 + ((i/K) / ρ)^(2·order))` damps a column of B and a row of A each,
    hence the square.

    Args:
        cutoff: `ρ`, a scalar.
        full_rank: K, or the highest rank on offer.
        order: The order of the filter; the higher, the steeper.

    Returns:
        [K], descending from 1.
    """
    index = torch.arange(1, full_rank + 1, dtype=cutoff.dtype, device=cutoff.device)
    power = log_response(index / full_rank / cutoff, order)
    return (power - power[0]).exp()


@dataclass(frozen=True)
class Relaxation:
    """One layer's weight between `Wq`, nothing kept, and `W`, all kept.

    `a` [g, K, k] and `b` [g, m/g, K] are the residual's factors at full rank, sorted by
    singular value. One merged weight runs; there is no second branch.
    """

    layer: QuantizedLayer
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, layer: QuantizedLayer, factors: Factors) -> "Relaxation":
        """Build it from a layer's factors."""
        like = layer.dequantized
        return cls(layer, factors.a.to(like), factors.b.to(like))

    def weight(self, kept: Tensor) -> Tensor:
        """`Wq + B diag(kept) A` for `kept`, of the first ranks or of all [K]."""
        b, a = self.b[..., : len(kept)], self.a[:, : len(kept)]
        residual = (b * kept.to(b)) @ a  # [g, m/g, k]
        return self.layer.dequantized + residual.reshape(self.layer.weight.shape)


def softened(outputs: Outputs, temperature: float) -> Outputs:
    """Outputs over a temperature; above 1 the classes come nearer to one another."""
    return {name: value / temperature for name, value in outputs.items()}


def penalty(cost: Tensor, budget: float, gamma: float) -> Tensor:
    """`γ · exp(ReLU(cost − budget))`, both in the unit of the budget."""
    return gamma * (cost - budget).relu().exp()
