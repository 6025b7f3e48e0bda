"""Reduced-rank regression: adapters against the whole output error, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters import Adapter, Factors
from cora_plugin.adapters.exact import exact, exact_device
from cora_plugin.adapters.form import Form
from cora_plugin.config import CoRaConfig
from cora_plugin.fitting.bias import OutputMatch
from cora_plugin.fitting.walk import Change, Visitor, Walk
from cora_plugin.layer import QuantizedLayer
from cora_plugin.statistics.metrics import weighting
from cora_plugin.statistics.moments import block_count

RIDGES = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Ridges to try, in units of `k / rows` times the mean diagonal of `Cov(v, v)`."""

LARGE = 1024
"""Columns beyond which ridges are compared in float32: a 3×3 layer of 512 channels has
4,608, and each ridge takes a factorization. Ridges are far above what that rounds."""

LAST = 2
"""How many of the last layers may have their means restored to full size."""


class CrossMoments:
    """Moments of a layer's inputs in both networks, `u` float and `v` quantized.

    Means [g, k]; `E[v vᵀ]` and `E[(u − v) vᵀ]` [g, b, k/b, k/b], all in float64.

    Args:
        layer: The layer.
        max_size: Largest k kept as one block.
    """

    def __init__(self, layer: QuantizedLayer, max_size: int) -> None:
        self._blocks = block_count(layer, max_size)
        groups, size = layer.operation.groups, layer.columns // self._blocks
        device = exact_device(layer.weight.device)
        shape = (2, groups, self._blocks, size, size)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        means = (2, groups, layer.columns)
        self._means = torch.zeros(means, dtype=torch.float64, device=device)
        self.rows = 0

    def update(self, u: Tensor, v: Tensor) -> None:
        """Add inputs at the same positions, [g, p, k] in float64."""
        self.rows += v.shape[1]
        self._means += torch.stack([u.sum(1), v.sum(1)])
        apart, split = self._split(u - v), self._split(v)
        self._sums[0] += split @ split.mT
        self._sums[1] += apart @ split.mT

    def pool(self, what: str) -> None:
        """Add what other processes have seen."""
        sums = [self._means, self._sums]
        (rows,) = processes.add_up(what, sums, [self.rows])
        self.rows = int(rows)

    def __iadd__(self, other: "CrossMoments") -> "CrossMoments":
        """Add the moments that another instance has seen of this layer."""
        self.rows += other.rows
        self._means += other._means
        self._sums += other._sums
        return self

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
            mean.reshape(*self._sums.shape[1:4], 1) for mean in self.means
        )
        second = self._sums[0] / self.rows - mean_v @ mean_v.mT
        # The variance of an input that never changes may round to less than nothing.
        second.diagonal(dim1=-2, dim2=-1).clamp_(min=0)
        cross = self._sums[1] / self.rows - (mean_u - mean_v) @ mean_v.mT
        return second, cross


class Regression:
    """Reduced-rank regression of the whole output error on the input, layer by layer.

    A layer's whole error, from upstream and from quantizing its input included, is
    `d = W u − Wq v`, with `u` the float network's input and `v` the quantized one's.
    The best correction of full rank, `Cov(d, v) Cov(v, v)⁻¹`, is the residual `E` plus
    the part of the upstream error that `v` predicts: `E + W Cov(u − v, v) Cov(v, v)⁻¹`.
    It is factored in the metric `Cov(v, v)` and that of the sensitivities, where there
    are any; the intercept is a bias correction (see `OutputMatch`).

    The second term is estimated from few images, so it gets a ridge: the one of
    `RIDGES` with which each half of the images best predicts the other half's upstream
    error.

    Args:
        walk: The layers.
        forms: The terms of each adapter, by layer name; other layers are left to the
            host.
        sensitivities: Curvatures at the outputs, by layer name.
        config: The settings.
    """

    def __init__(
        self,
        walk: Walk,
        forms: Mapping[str, tuple[Form, ...]],
        sensitivities: Mapping[str, Tensor | None],
        config: CoRaConfig,
    ) -> None:
        self._walk = walk
        self._forms = forms
        self._sensitivities = sensitivities
        self._config = config
        self._changes: dict[str, Change] = {}

    def __call__(self) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
        """Adapters and shifts [m] by layer, each found with those before in place."""
        self._changes = self._walk(self._visitor)
        self._walk.forget(list(self._changes)[: 1 - LAST])
        return _apart(self._changes)

    @property
    def visited(self) -> int:
        """How many layers it has changed."""
        return len(self._changes)

    def with_whole_means(
        self, last: int
    ) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
        """The same, with the mean outputs of the last layers restored to full size.

        Args:
            last: How many layers, at most `LAST` and those visited. Those behind the
                first of these are solved again.
        """
        changes = list(self._changes.items())
        known = dict(changes[: len(changes) + 1 - last])
        whole = [name for name, _ in changes[-last:]]
        known[whole[0]] = _whole(known[whole[0]])
        again = known if last == 1 else self._walk(self._visitor, known=known)
        return _apart({n: _whole(e) if n in whole else e for n, e in again.items()})

    def _visitor(self, layer: QuantizedLayer) -> Visitor:
        match = OutputMatch(layer, layer.dequantized)
        if layer.name not in self._forms:
            return match
        curvature = self._sensitivities.get(layer.name)
        forms = self._forms[layer.name]
        return _Regression(layer, forms, match, curvature, self._config)


def _whole(change: Change) -> Change:
    if change.whole_shift is None:
        return change
    return replace(change, shift=change.whole_shift)


def _apart(
    changes: Mapping[str, Change],
) -> tuple[dict[str, Adapter], dict[str, Tensor]]:
    adapters = {n: each.adapter for n, each in changes.items() if each.adapter}
    return adapters, {name: each.shift for name, each in changes.items()}


class _Regression:
    """Finds the adapter and the shift of one layer."""

    def __init__(
        self,
        layer: QuantizedLayer,
        forms: tuple[Form, ...],
        match: OutputMatch,
        sensitivity: Tensor | None,
        config: CoRaConfig,
    ) -> None:
        self._layer = layer
        self._forms = forms
        self._match = match
        self._sensitivity = sensitivity
        self._config = config
        self._halves = [CrossMoments(layer, config.max_metric) for _ in range(2)]

    def update(self, part: int, u: Tensor, v: Tensor) -> None:
        """Add inputs at the same positions, [g, p, k], float and quantized."""
        self._match.update(part, u, v)
        self._halves[part % 2].update(u, v)

    def pool(self) -> None:
        """Add what other processes have seen."""
        self._match.pool()
        for half in self._halves:
            half.pool(f"regression of {self._layer.name}")

    def change(self, mean: Tensor, other: Tensor) -> Change:
        """The adapter as stored, and the shift that goes with it."""
        layer, config = self._layer, self._config
        ridge = _best_ridge(layer, *self._halves)
        moments, other_half = self._halves
        moments += other_half
        second, cross = moments.covariances
        arriving = _times(layer, exact(layer.weight), cross)
        upstream = _upstream_regression(layer, second, arriving, moments.rows, ridge)
        target = layer.residual + upstream
        metric = weighting(layer, second, self._sensitivity, config.damping)
        factors = Factors.of(target, layer.operation, metric, layer.name)
        adapter = factors.adapter_of(self._forms)
        added = adapter.merged().to(layer.dequantized)
        effect, covariance = _effect(layer, added, moments.means[1], cross + second)
        other = other + effect
        shift = self._match.shift(mean, other, covariance)
        return Change(shift, adapter, self._match.whole_shift(mean, other))


def _best_ridge(layer: QuantizedLayer, one: CrossMoments, other: CrossMoments) -> float:
    """The ridge with which each half of the images best predicts the other's error."""
    if not one.rows or not other.rows:
        return 1.0
    weight = exact(layer.weight)
    halves = []
    for half in (one, other):
        second, cross = half.covariances
        arriving = _times(layer, weight, cross)
        if second.shape[-1] > LARGE:
            second, arriving = second.float(), arriving.float()
        halves.append((second, arriving, half.rows))

    @cache
    def missed(ridge: float) -> float:
        """E|W (u − v) − T v|² of both halves, less what no T changes."""
        total = 0.0
        for here, there in (halves, halves[::-1]):
            upstream = _upstream_regression(layer, *here, ridge)
            second, arriving, _ = there
            left = _times(layer, upstream, second) - 2 * arriving
            total += float((left * layer.operation.matrices(upstream)).sum())
        return total

    return downhill(RIDGES, missed)


def downhill(values: Sequence[float], height: Callable[[float], float]) -> float:
    """The lowest of some values, found from the middle, where there is one valley.

    Args:
        values: In their order.
        height: Of a value; asked of some of them, of some again.
    """
    place = len(values) // 2
    while True:
        near = range(max(place - 1, 0), min(place + 2, len(values)))
        lowest = min(near, key=lambda index: height(values[index]))
        if lowest == place:
            return values[place]
        place = lowest


def _upstream_regression(
    layer: QuantizedLayer, second: Tensor, arriving: Tensor, rows: int, ridge: float
) -> Tensor:
    """The upstream error's regression `W C (S + ridge)⁻¹`, in the weight's shape.

    Args:
        layer: The layer.
        second: `S = Cov(v, v)`, [g, b, k/b, k/b].
        arriving: `W C` with `C = Cov(u − v, v)`, [g, m/g, k].
        rows: How many rows both come from.
        ridge: In the units of `RIDGES`.
    """
    mean = second.diagonal(dim1=-2, dim2=-1).mean((1, 2))  # [g]
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(second.shape[-1], dtype=second.dtype, device=second.device)
    damping = ridge * layer.columns / rows * mean
    factor = torch.linalg.cholesky(second + damping[:, None, None, None] * eye)
    # (X D⁻¹)ᵀ = D⁻¹ Xᵀ, D symmetric
    solved = torch.cholesky_solve(_blocked(arriving, second).mT, factor).mT
    return solved.transpose(1, 2).reshape(layer.weight.shape)


def _times(layer: QuantizedLayer, weight: Tensor, blocks: Tensor) -> Tensor:
    """A weight times a block diagonal matrix [g, b, k/b, k/b]; [g, m/g, k]."""
    rows = layer.operation.matrices(weight)  # [g, m/g, k]
    return (_blocked(rows, blocks) @ blocks).transpose(1, 2).reshape(rows.shape)


def _blocked(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows [g, m/g, k] in the columns of the blocks, [g, b, m/g, k/b]."""
    groups, count, size, _ = blocks.shape
    return rows.reshape(groups, -1, count, size).transpose(1, 2)


def _effect(
    layer: QuantizedLayer, added: Tensor, mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """What an added weight adds to the mean output and its covariance with y, [m]."""
    matrices = layer.operation.matrices(exact(added))
    change = (matrices @ mean.unsqueeze(-1)).flatten()
    # Cov(W u, D v) = W Cov(u, v) Dᵀ, of which the diagonal is wanted.
    reached = _times(layer, exact(layer.weight), covariance)
    return change, (reached * matrices).sum(-1).flatten()
