"""Reduced-rank regression: adapters against the whole output error, layer by layer."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cora_plugin.adapters import Adapter, Factors
from cora_plugin.config import CoRaConfig
from cora_plugin.fitting.bias import OutputMatch
from cora_plugin.fitting.walk import Pair, Walk
from cora_plugin.layer import QuantizedLayer
from cora_plugin.statistics.metrics import weighting
from cora_plugin.statistics.moments import block_count, sampled_columns


class CrossMoments:
    """Moments of a layer's inputs in both networks, `u` float and `v` quantized.

    Means [g, k]; `E[v vᵀ]` and `E[(u − v) vᵀ]` [g, b, k/b, k/b], all in float64.

    Args:
        layer: The layer.
        max_size: Largest k kept as one block.
        positions: Output positions an image kept at most, 0 for all.
    """

    def __init__(self, layer: QuantizedLayer, max_size: int, positions: int) -> None:
        self._layer = layer
        self._positions = min(positions, layer.columns)
        self._turn = 0
        self._blocks = block_count(layer, max_size)
        groups, size = layer.operation.groups, layer.columns // self._blocks
        device, exact = layer.weight.device, torch.float64
        shape = (groups, self._blocks, size, size)
        self._second = torch.zeros(shape, dtype=exact, device=device)
        self._cross = torch.zeros(shape, dtype=exact, device=device)
        means = (2, groups, layer.columns)
        self._means = torch.zeros(means, dtype=exact, device=device)
        self.rows = 0

    def update(self, pair: Pair) -> None:
        """Add one run."""
        arguments = (self._positions, self._turn)
        layer = self._layer
        self._turn += 1
        for u, v in zip(
            sampled_columns(layer, pair.float_input, pair.float_output, *arguments),
            sampled_columns(layer, pair.input, pair.output, *arguments),
            strict=True,
        ):
            self.rows += v.shape[1]
            self._means += torch.stack([u.sum(1), v.sum(1)])
            apart, split = self._split(u - v), self._split(v)
            self._cross += apart @ split.mT
            self._second += split @ split.mT

    def _split(self, columns: Tensor) -> Tensor:
        groups, rows, _ = columns.shape
        return columns.mT.reshape(groups, self._blocks, -1, rows)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """`E[u]` and `E[v]`."""
        mean_u, mean_v = self._means / self.rows
        return mean_u, mean_v

    @property
    def covariances(self) -> tuple[Tensor, Tensor]:
        """`Cov(v, v)` and `Cov(u − v, v)`."""
        mean_u, mean_v = (
            mean.reshape(*self._second.shape[:3], 1) for mean in self.means
        )
        second = self._second / self.rows - mean_v @ mean_v.mT
        # The variance of an input that never changes may round to less than nothing.
        second.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
        cross = self._cross / self.rows - (mean_u - mean_v) @ mean_v.mT
        return second, cross


def regress(
    walk: Walk,
    ranks: Mapping[str, int],
    sensitivities: Mapping[str, Tensor | None],
    config: CoRaConfig,
) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    """Adapters and shifts by regression of the whole output error on the input.

    The error of a layer, upstream's and the quantization of its input included, is
    `d = W u − Wq v`, with `u` the float network's input and `v` the quantized one's.
    The best correction of full rank, `Cov(d, v) Cov(v, v)⁻¹`, is the residual `E` plus
    what `v` tells of the error that arrives: `E + W Cov(u − v, v) Cov(v, v)⁻¹`. It is
    factored in the metric `Cov(v, v)`, and of the sensitivities where there are any;
    the intercept is a bias correction (see `OutputMatch`).

    The second term is an estimate from few rows, so it has a ridge of `k / rows` mean
    diagonals: with as many rows as columns it is at least halved.

    Args:
        walk: The layers.
        ranks: Ranks by layer name; the others are left to the host.
        sensitivities: Curvatures at the outputs, by layer name.
        config: The settings.

    Returns:
        Adapters and shifts [m] by layer name, each found with those before in place.
    """
    adapters: dict[str, Adapter] = {}
    shifts: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for layer in walk:
        match = OutputMatch(layer)
        moments = CrossMoments(layer, config.max_metric, config.positions)
        for pair in walk.pairs(layer, weights, shifts):
            match.update(pair)
            if ranks.get(layer.name):
                moments.update(pair)
        if not ranks.get(layer.name):
            shifts[layer.name] = match.shift()
            continue
        second, cross = moments.covariances
        target = layer.residual + _upstream(layer, second, cross, moments.rows)
        metric = weighting(layer, second, sensitivities.get(layer.name), config.damping)
        factors = Factors.of(target, layer.operation, metric, layer.name)
        adapter = factors.adapter(ranks[layer.name], config.adapter_bits, layer.name)
        added = adapter.merged().to(layer.dequantized)
        adapters[layer.name] = adapter
        weights[layer.name] = layer.dequantized + added
        _, mean = moments.means
        effect = _effect(layer, added, mean, cross + second)
        shifts[layer.name] = match.shift(*effect)
    return adapters, shifts


def _upstream(
    layer: QuantizedLayer, second: Tensor, cross: Tensor, rows: int
) -> Tensor:
    """`W Cov(u − v, v) (Cov(v, v) + ridge)⁻¹` in the shape of the weight."""
    mean = second.diagonal(dim1=-2, dim2=-1).mean((1, 2))  # [g]
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    ridge = layer.columns / rows * mean
    eye = torch.eye(second.shape[-1], dtype=second.dtype, device=second.device)
    damped = second + ridge[:, None, None, None] * eye
    # (C D⁻¹)ᵀ = D⁻¹ Cᵀ, D symmetric
    map_back = torch.linalg.solve(damped, cross.mT).mT
    return _times(layer, layer.weight.double(), map_back).reshape(layer.weight.shape)


def _times(layer: QuantizedLayer, weight: Tensor, blocks: Tensor) -> Tensor:
    """A weight times a block diagonal matrix [g, b, k/b, k/b]; [g, m/g, k]."""
    rows = layer.operation.matrices(weight)  # [g, m/g, k]
    groups, count, size, _ = blocks.shape
    split = rows.reshape(groups, -1, count, size).transpose(1, 2)  # [g, b, m/g, k/b]
    return (split @ blocks).transpose(1, 2).reshape(rows.shape)


def _effect(
    layer: QuantizedLayer, added: Tensor, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """What an added weight adds to the mean output and its covariance with y, [m]."""
    matrices = layer.operation.matrices(added.double())
    change = (matrices @ mean.unsqueeze(-1)).flatten()
    # Cov(W u, D v) = W Cov(u, v) Dᵀ, of which the diagonal is wanted.
    reached = _times(layer, layer.weight.double(), covariance)
    return change, (reached * matrices).sum(-1).flatten()
