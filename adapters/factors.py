"""A residual in factors, of which adapters of any rank are slices."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cora_plugin.adapters.adapter import Adapter, Term
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.exact import exact
from cora_plugin.adapters.factor import Weighting, truncate
from cora_plugin.adapters.form import Form, residual_matrices
from cora_plugin.adapters.operation import Operation


@dataclass(frozen=True)
class Factors:
    """A residual factored once: its adapter at any rank is a slice.

    `a` [g, K, k] and `b` [g, m/g, K] in float64, K the full rank, in the order of their
    share of the error; `residual` has the weight's shape.
    """

    residual: Tensor
    a: Tensor
    b: Tensor
    operation: Operation

    @classmethod
    def of(
        cls,
        residual: Tensor,
        operation: Operation,
        weighting: Weighting,
        name: str = "layer",
    ) -> "Factors":
        """Factor a residual [m, n/g, *kernel] or [m, n] in a metric.

        Raises:
            ModelError: The residual is not finite.
        """
        matrices = residual_matrices(residual, operation.groups)
        full = min(matrices.shape[1:])
        a, b = truncate(matrices, full, weighting, name)
        return cls(residual, a, b, operation)

    @property
    def full_rank(self) -> int:
        """K, the largest rank."""
        return self.a.shape[1]

    def adapter(self, rank: int, bits: int = 8, name: str = "layer") -> Adapter:
        """Quantize the factors of a rank, or the residual where it is the smaller.

        Args:
            rank: Rank a group, from 1 to the full rank.
            bits: Bit width of the stored factors, 2 to 8, or 32 for float.
            name: The layer, for messages.

        Raises:
            CoRaError: The rank is impossible.
        """
        if rank < 1:
            raise CoRaError(
                f"{name}: rank {rank} makes no adapter; leave the layer out"
            )
        if rank > self.full_rank:
            rows, columns = self.b.shape[1], self.a.shape[2]
            raise CoRaError(
                f"{name}: rank {rank} is outside 0..{self.full_rank}, the smaller side "
                f"of its {rows}×{columns} weight; pass rank <= {self.full_rank}"
            )
        shape = tuple(self.residual.shape)
        form = Form.smallest(rank, bits, shape, self.operation.groups)
        return self.adapter_of((form,))

    def adapter_of(self, forms: Sequence[Form]) -> Adapter:
        """Quantize an adapter of these terms, each of what those before it leave.

        Args:
            forms: Of this residual's shape; factors come first, if there are any.
        """
        first, *others = forms
        if not first.factored:
            return series(self.residual, forms)
        values = first.values(self.residual, *self._slice(first.rank))
        made = Adapter.of([first], values)
        left = self.residual - made.merged().to(self.residual)
        return Adapter(made.terms + series(left, others).terms) if others else made

    def _slice(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors [g, r, k] and [g, m/g, r] of a rank."""
        a, b = self.a[:, :rank], self.b[..., :rank]
        # A rank's share may be scaled in either factor: the sizes of b's columns move
        # into a's rows, for b has one scale in all.
        largest = b.abs().amax(1, keepdim=True)  # [g, 1, r]
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        return a * largest.mT, b / largest


def series(residual: Tensor, forms: Sequence[Form]) -> Adapter:
    """Whole terms, each of what those before it leave of a residual.

    Args:
        residual: The layer's weight less what stands for it, [m, n/g, *kernel].
        forms: Of its shape, none of factors.
    """
    terms: list[Term] = []
    left = exact(residual)
    for form in forms:
        terms.append(Term(form, form.quantize({"a": left})))
        left = left - Adapter((terms[-1],)).merged().to(left)
    return Adapter(tuple(terms))


def make_adapter(
    residual: Tensor,
    operation: Operation,
    rank: int,
    weighting: Weighting,
    bits: int = 8,
    name: str = "layer",
) -> Adapter:
    """Factor a residual and quantize the factors of one rank: see `Factors`."""
    return Factors.of(residual, operation, weighting, name).adapter(rank, bits, name)
