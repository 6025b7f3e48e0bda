"""What stands beside one layer: its factors, as they are stored."""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import Weighting, truncate
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
    """

    kind: Kind
    rank: int
    a: QuantizedTensor
    b: QuantizedTensor | None
    weight_shape: tuple[int, ...]
    groups: int = 1

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
        a = self.a.dequantize()
        if self.b is None:
            return a
        b = self.b.dequantize()
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


def make_adapter(
    residual: Tensor,
    operation: Operation,
    rank: int,
    weighting: Weighting,
    bits: int = 8,
    name: str = "layer",
) -> Adapter:
    """Factor a residual and quantize the factors.

    Args:
        residual: `E = W − Wq`, [m, n/g, *kernel] or [m, n].
        operation: The layer's operation.
        rank: Rank a group, from 1 to the full rank.
        weighting: The metrics of the inputs and outputs.
        bits: Bit width of the stored factors, 2 to 8, or 32 for float.
        name: The layer, for messages.

    Raises:
        CoRaError: The rank is impossible or the residual not finite.
    """
    shape = tuple(residual.shape)
    matrices = residual_matrices(residual, operation)
    if rank < 1:
        raise CoRaError(f"{name}: rank {rank} makes no adapter; leave the layer out")
    kind = kind_of(shape, operation, rank)
    if kind is Kind.FULL and rank <= full_rank(shape, operation):
        if not torch.isfinite(residual).all():
            raise CoRaError(f"{name}: its residual holds NaN or inf")
        stored = quantize(residual, bits)
        return Adapter(kind, rank, stored, None, shape, operation.groups)
    a, b = truncate(matrices, rank, weighting, name)
    if kind is Kind.SHARED_BASIS:
        a, b = a[0], b[0]  # [r, k], [m, r]
    else:
        a = a.reshape(-1, *shape[1:])  # [g·r, n/g, *kernel]
        b = b.reshape(shape[0], rank, *[1] * operation.dimensions)
    return Adapter(
        kind, rank, quantize(a, bits), quantize(b, bits), shape, operation.groups
    )
