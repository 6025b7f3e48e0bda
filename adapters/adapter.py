"""What stands beside one layer: its factors, as they are stored."""

import math
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import Weighting, truncate
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.adapters.operation import Operation
from cora_plugin.adapters.quantized import QuantizedTensor, quantize


class Kind(str, Enum):
    """How a residual is represented."""

    LOW_RANK = "low-rank"
    """Two convolutions: A with the layer's kernel, then B, 1×1."""
    SHARED_BASIS = "shared-basis"
    """Depthwise: `E ≈ BA` over the channels as rows; one convolution with kernel BA."""
    FULL = "full"
    """The residual itself, where factors would cost more than it does."""

    def __str__(self) -> str:
        """The plain name, as files and reports show it."""
        return self.value


@dataclass(frozen=True)
class Adapter:
    """Stored factors of one layer, by name.

    * low-rank: `a` [g·r, n/g, *kernel] and `b` [m, r, 1…] (linear: [r, n] and [m, r]);
    * shared-basis: `a` [r, k] and `b` [m, r];
    * full: `a` [m, n/g, *kernel].

    `a` has a scale a channel. `b` has one in all: it is stored as the levels of its
    columns, whose scales stand in those of `a`, a rank each.

    `fingerprint` tells the quantized weight that it was made for, once it stands beside
    a layer.
    """

    kind: Kind
    rank: int
    a: QuantizedTensor
    b: QuantizedTensor | None
    weight_shape: tuple[int, ...]
    groups: int = 1
    fingerprint: Fingerprint | None = None

    @property
    def tensors(self) -> dict[str, QuantizedTensor]:
        """The stored tensors by name."""
        return {"a": self.a} if self.b is None else {"a": self.a, "b": self.b}

    @property
    def parameters(self) -> int:
        """Stored values, scales not counted."""
        return sum(t.parameters for t in self.tensors.values())

    @property
    def stored_bits(self) -> int:
        """Stored bits, scales counted."""
        return sum(t.stored_bits for t in self.tensors.values())

    def merged(self) -> Tensor:
        """The weight that the branch amounts to, [m, n/g, *kernel], float32."""
        return self.product(*(t.dequantize() for t in self.tensors.values()))

    def scaled(self, share: float) -> "Adapter":
        """An adapter that amounts to a share of the weight of this one."""
        return replace(self, a=self.a.scaled(share))

    def product(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """The weight that factors of this adapter's shapes amount to."""
        if b is None:
            return a
        groups = self.groups if self.kind is Kind.LOW_RANK else 1
        rows = a.reshape(groups, self.rank, -1)
        columns = b.reshape(groups, -1, self.rank)
        return (columns @ rows).reshape(self.weight_shape)


def is_depthwise(weight_shape: tuple[int, ...], operation: Operation) -> bool:
    """Whether each group sees a single input channel, so that rank 1 a group is all."""
    return operation.groups > 1 and weight_shape[1] == 1


def residual_matrices(residual: Tensor, operation: Operation) -> Tensor:
    """The matrices that are factored: [g, m/g, k], or [1, m, k] when depthwise."""
    if is_depthwise(tuple(residual.shape), operation):
        return residual.reshape(1, residual.shape[0], -1)
    return operation.matrices(residual)


def full_rank(weight_shape: tuple[int, ...], operation: Operation) -> int:
    """Largest useful rank of the matrices of `residual_matrices`."""
    columns = math.prod(weight_shape[1:])
    rows = weight_shape[0]
    if not is_depthwise(weight_shape, operation):
        rows //= operation.groups
    return min(rows, columns)


def kind_of(weight_shape: tuple[int, ...], operation: Operation, rank: int) -> Kind:
    """The kind of a rank: factors while they are smaller than the residual itself."""
    depthwise = is_depthwise(weight_shape, operation)
    columns = math.prod(weight_shape[1:])
    groups = 1 if depthwise else operation.groups
    factors = rank * (weight_shape[0] + groups * columns)
    if factors >= weight_shape[0] * columns:
        return Kind.FULL
    return Kind.SHARED_BASIS if depthwise else Kind.LOW_RANK


def factor_shapes(
    kind: Kind, rank: int, weight_shape: tuple[int, ...], groups: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's stored tensors by name."""
    rows, *inner = weight_shape
    if kind is Kind.FULL:
        return {"a": weight_shape}
    if kind is Kind.SHARED_BASIS:
        return {"a": (rank, math.prod(inner)), "b": (rows, rank)}
    return {
        "a": (groups * rank, *inner),
        "b": (rows, rank, *[1] * (len(weight_shape) - 2)),
    }


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
            CoRaError: The residual is not finite.
        """
        matrices = residual_matrices(residual, operation)
        full = min(matrices.shape[1:])
        a, b = truncate(matrices, full, weighting, name)
        return cls(residual, a, b, operation)

    @property
    def full_rank(self) -> int:
        """K, the largest rank."""
        return self.a.shape[1]

    def adapter(self, rank: int, bits: int = 8, name: str = "layer") -> Adapter:
        """Quantize the factors of a rank.

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
        kind = kind_of(shape, self.operation, rank)
        groups = self.operation.groups
        if kind is Kind.FULL:
            stored = quantize(self.residual, bits)
            return Adapter(kind, rank, stored, None, shape, groups)
        shapes = factor_shapes(kind, rank, shape, groups)
        a, b = self.a[:, :rank], self.b[..., :rank]  # [g, r, k] and [g, m/g, r]
        # A rank's share may be scaled in either factor: b's scale moves into a's, for a
        # scale a row of b would cost as much as several ranks do.
        largest = b.abs().amax(1, keepdim=True)  # [g, 1, r]
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        a, b = a * largest.mT, b / largest
        return Adapter(
            kind,
            rank,
            quantize(a.reshape(shapes["a"]), bits),
            quantize(b.reshape(shapes["b"]), bits, channels=False),
            shape,
            groups,
        )


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
