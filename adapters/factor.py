"""Closed-form factors: metric-weighted truncation of a residual.

With `S Sᵀ = M` the metric of the inputs and `Lᵀ L = G` that of the outputs, the best
rank-r `BA` in `tr(G (E − BA) M (E − BA)ᵀ)` is `L⁻¹ [L E S]_r S⁻¹`, where `[·]_r` is the
truncated SVD. `G = I` gives LQER (arXiv 2402.02446) and QERA (arXiv 2410.06040), and
`M = I` as well gives ZeroQuant-V2's LoRC (arXiv 2303.08302).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError, DataError, ModelError
from cora_plugin.adapters.exact import eigenvalues, eigenvectors, exact


@dataclass(frozen=True)
class Root:
    """A square root `S` of a metric, `S Sᵀ = M`, of k inputs or outputs.

    `factor` is [g, k] for a diagonal metric, or [g, b, k/b, k/b], lower triangular,
    for one of b diagonal blocks (b = 1: the whole metric).
    """

    factor: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """`matrix · S` for [g, m, k]."""
        if self.factor.ndim == 2:
            return matrix * self.factor[:, None, :]
        return self._blockwise(matrix, solve=False)

    def divide(self, matrix: Tensor) -> Tensor:
        """`matrix · S⁻¹` for [g, m, k]."""
        if self.factor.ndim == 2:
            return matrix / self.factor[:, None, :]
        return self._blockwise(matrix, solve=True)

    def _blockwise(self, matrix: Tensor, solve: bool) -> Tensor:
        groups, blocks, size, _ = self.factor.shape
        rows = matrix.shape[1]
        split = matrix.reshape(groups, rows, blocks, size).transpose(1, 2)
        out: Tensor
        if solve:
            out = torch.linalg.solve_triangular(
                self.factor, split, upper=False, left=False
            )
        else:
            out = split @ self.factor
        return out.transpose(1, 2).reshape(groups, rows, blocks * size)


def metric_root(metric: Tensor, damping: float, name: str) -> Root:
    """Factor a damped metric, `S Sᵀ = M + damping · mean(diag M) · I`, in float64.

    A group whose diagonal is all zero (its inputs are dead) has no scale of its own and
    gets the identity. Where Cholesky still fails, because rounding made a sum of outer
    products indefinite, the eigenvalues are raised to the damping.

    Args:
        metric: [g, k] (diagonal) or [g, b, k/b, k/b] (b diagonal blocks).
        damping: Relative to the mean of the diagonal, ≥ 0.
        name: The layer, for messages.

    Raises:
        DataError: The metric is not finite or has a negative diagonal.
    """
    metric = exact(metric)
    diagonal = metric if metric.ndim == 2 else metric.diagonal(dim1=-2, dim2=-1)
    if not torch.isfinite(metric).all():
        raise DataError(
            f"{name}: its calibration statistics are not finite; look for NaN, inf or "
            "very large activations in the calibration data"
        )
    if (diagonal < 0).any():
        raise DataError(f"{name}: a second moment below zero is not a metric")
    mean = diagonal.flatten(1).mean(1)  # [g]
    dead = mean == 0
    shift = torch.where(dead, torch.ones_like(mean), damping * mean)
    if metric.ndim == 2:
        damped = metric + shift[:, None]
        # Without damping, an input that is always zero would magnify rounding.
        floor = 1e-12 * damped.amax(1, keepdim=True)
        return Root(damped.maximum(floor).sqrt())
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    damped = metric + shift[:, None, None, None] * eye
    factor, info = torch.linalg.cholesky_ex(damped)
    # Not `info` alone: with a pivot that rounds to almost zero, Cholesky "succeeds"
    # with a factor whose inverse magnifies rounding beyond any use.
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    largest = pivots.amax(-1)
    failed = (info > 0) | ~(pivots.amin(-1) > 1e-9 * largest)
    for index in failed.nonzero().cpu().tolist():
        values, vectors = torch.linalg.eigh(damped[tuple(index)])
        least = max(float(shift[index[0]]), 1e-12 * float(values[-1]))
        half = vectors * values.clamp_min(least).sqrt()
        # half · halfᵀ = M and half = Rᵀ Qᵀ, hence Rᵀ is a triangular root.
        factor[tuple(index)] = torch.linalg.qr(half.T, mode="r").R.T
    return Root(factor)


@dataclass(frozen=True)
class Weighting:
    """The metric of the inputs and, optionally, of the outputs; None is the identity.

    `outputs` holds a root `C` of `G = C Cᵀ`, so that `L = Cᵀ`.
    """

    inputs: Root | None = None
    outputs: Root | None = None

    def apply(self, residual: Tensor) -> Tensor:
        """`L E S` for `E` [g, m/g, k], in float64."""
        return self.apply_outputs(self.apply_inputs(exact(residual)))

    def apply_inputs(self, residual: Tensor) -> Tensor:
        """`E S`."""
        return residual if self.inputs is None else self.inputs.times(residual)

    def apply_outputs(self, residual: Tensor) -> Tensor:
        """`L E`."""
        if self.outputs is None:
            return residual
        # Cᵀ E = (Eᵀ C)ᵀ
        return self.outputs.times(residual.mT).mT

    def undo_inputs(self, right: Tensor) -> Tensor:
        """`V S⁻¹` for `V` [g, r, k]."""
        return right if self.inputs is None else self.inputs.divide(right)

    def undo_outputs(self, left: Tensor) -> Tensor:
        """`L⁻¹ U` for `U` [g, m/g, r]."""
        if self.outputs is None:
            return left
        # C⁻ᵀ U = (Uᵀ C⁻¹)ᵀ
        return self.outputs.divide(left.mT).mT


def removed_error(residual: Tensor, weighting: Weighting) -> Tensor:
    """Output error that each rank-one term removes: σ² of `L E S`, summed over groups.

    Args:
        residual: `E`, [g, m/g, k].
        weighting: The metrics.

    Returns:
        [K] in float64, descending, K = min(m/g, k).
    """
    weighted = weighting.apply(residual)
    if weighted.shape[1] > weighted.shape[2]:
        weighted = weighted.mT
    # Eigenvalues of the small Gram matrix are σ² and cost a fraction of an SVD. What
    # squaring loses, σ below 1e-8 of the largest, is far under what a search looks at.
    values = eigenvalues(weighted @ weighted.mT).clamp_min(0)
    return values.sum(0).flip(0)


def truncate(
    residual: Tensor, rank: int, weighting: Weighting, name: str = "layer"
) -> tuple[Tensor, Tensor]:
    """Best factors of rank `rank` in the metric, `BA = L⁻¹ U_r Σ_r V_rᵀ S⁻¹`.

    It is computed as a projection, by the eigenvectors of the smaller Gram matrix. The
    sizes of the singular values are in the rows of A.

    Args:
        residual: `E`, [g, m/g, k].
        rank: r, the same in each group, 0 ≤ r ≤ min(m/g, k).
        weighting: The metrics.
        name: The layer, for messages.

    Returns:
        A [g, r, k] and B [g, m/g, r], in float64.

    Raises:
        CoRaError: The rank exceeds the full rank.
        ModelError: The residual is not finite.
    """
    _, rows, columns = residual.shape
    full = min(rows, columns)
    if not 0 <= rank <= full:
        raise CoRaError(
            f"{name}: rank {rank} is outside 0..{full}, the smaller side of its "
            f"{rows}×{columns} weight; pass rank <= {full}"
        )
    if not torch.isfinite(residual).all():
        raise ModelError(f"{name}: its residual holds NaN or inf; look at its weights")
    full_error = exact(residual)
    weighted = weighting.apply(full_error)  # X = L E S, [g, m/g, k]
    if rows <= columns:
        # X Xᵀ = U Σ² Uᵀ, hence BA = L⁻¹ U_r U_rᵀ L E: S need not be undone at all.
        basis = _leading(weighted @ weighted.mT, rank)  # U_r [g, m/g, r]
        a = basis.mT @ weighting.apply_outputs(full_error)
        return a, weighting.undo_outputs(basis)
    # Xᵀ X = V Σ² Vᵀ, hence BA = E S V_r V_rᵀ S⁻¹: L need not be undone.
    basis = _leading(weighted.mT @ weighted, rank)  # V_r [g, k, r]
    b = weighting.apply_inputs(full_error) @ basis
    size = b.norm(dim=1, keepdim=True)  # [g, 1, r]
    size = torch.where(size == 0, torch.ones_like(size), size)
    return size.mT * weighting.undo_inputs(basis.mT), b / size


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Orthonormal eigenvectors of the `rank` largest eigenvalues, [g, n, r].

    Squaring the singular values mixes only directions whose share of the error is
    below rounding, and a full rank is the whole space however they are mixed.
    """
    return eigenvectors(gram).flip(-1)[..., :rank]


def weighted_error(residual: Tensor, weighting: Weighting) -> float:
    """`tr(G E M Eᵀ)`, the output error of a residual `E` [g, m/g, k]."""
    return float(weighting.apply(residual).square().sum())
