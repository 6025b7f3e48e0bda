"""Forms of adapter terms: their kinds, shapes, cost, storage and computation.

No other module tells kinds apart; a new kind is added here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.operation import Operation
from cora_plugin.adapters.quantized import FLOAT_BITS, QuantizedTensor, quantize


class Kind(str, Enum):
    """How a residual is represented."""

    LOW_RANK = "low-rank"
    """Two convolutions: A with the layer's kernel, then B, 1×1."""
    SHARED_BASIS = "shared-basis"
    """Depthwise: `E ≈ BA` over the channels as rows; one convolution with kernel BA."""
    WHOLE = "whole"
    """A weight of the layer's own shape, in few bits."""

    def __str__(self) -> str:
        """The plain name, as files and reports show it."""
        return self.value


class Role(Enum):
    """How a tensor of a term is used."""

    FILTERS = "filters"
    """As the weight of a layer that slides as the adapted one does."""
    POINTWISE = "pointwise"
    """As the weight of a layer that mixes the channels of what comes before it."""
    MATRIX = "matrix"
    """As a factor of the one kernel that runs."""


def earlier_fields(kind: str, rank: int, bits: int) -> dict[str, Any]:
    """The `Form.fields` of an adapter of version 0.1, which called a whole one full."""
    return {"kind": "whole" if kind == "full" else kind, "rank": rank, "bits": bits}


@dataclass(frozen=True)
class Cost:
    """Parameters and stored bits, scales counted, and multiply-accumulates an image."""

    parameters: int = 0
    bits: int = 0
    macs: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.bits + other.bits,
            self.macs + other.macs,
        )

    def of(self, unit: str) -> int:
        """The number that a budget of `unit` limits."""
        return {"params": self.parameters, "bits": self.bits, "macs": self.macs}[unit]


@dataclass(frozen=True)
class Form:
    """The kind, size and bit width of a term, without its values.

    `rank` is that of each group; `bits` the width of the stored tensors, 2 to 8, or 32
    for float; `weight_shape` the layer's, [m, n/g, *kernel] or [m, n].

    Raises:
        CoRaError: A field is impossible.
    """

    kind: Kind
    rank: int
    bits: int
    weight_shape: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        shape = self.weight_shape
        sizes = (self.rank, self.bits, self.groups, *shape)
        if not all(type(size) is int and size > 0 for size in sizes):
            raise CoRaError(f"{sizes} should be whole numbers above 0")
        if self.bits != FLOAT_BITS and not 2 <= self.bits <= 8:
            raise CoRaError(
                f"{self.bits} bits are not stored; pass 2 to 8, or {FLOAT_BITS} for "
                "float"
            )
        if len(shape) < 2 or shape[0] % self.groups:
            raise CoRaError(
                f"{self.groups} groups do not divide a weight {list(shape)}"
            )
        if self.kind is Kind.SHARED_BASIS and not is_depthwise(shape, self.groups):
            raise CoRaError(f"a weight {list(shape)} is not depthwise")

    @classmethod
    def smallest(
        cls, rank: int, bits: int, weight_shape: tuple[int, ...], groups: int = 1
    ) -> "Form":
        """The form of a rank: factors while they have fewer values than the weight."""
        depthwise = is_depthwise(weight_shape, groups)
        kind = Kind.SHARED_BASIS if depthwise else Kind.LOW_RANK
        factors = cls(kind, rank, bits, weight_shape, groups)
        if factors._values < math.prod(weight_shape):
            return factors
        return cls(Kind.WHOLE, rank, bits, weight_shape, groups)

    @classmethod
    def whole(cls, bits: int, weight_shape: tuple[int, ...], groups: int = 1) -> "Form":
        """A term of the layer's own shape, which is of full rank."""
        rank = full_rank(weight_shape, groups)
        return cls(Kind.WHOLE, rank, bits, weight_shape, groups)

    @classmethod
    def read(
        cls, fields: Mapping[str, Any], weight_shape: tuple[int, ...], groups: int
    ) -> "Form":
        """A form from its `fields`.

        Raises:
            KeyError, TypeError, ValueError: They are not those of a form.
        """
        kind = Kind(fields["kind"])
        return cls(kind, fields["rank"], fields["bits"], weight_shape, groups)

    @property
    def fields(self) -> dict[str, Any]:
        """All but the layer's shape and groups, as JSON holds it."""
        return {"kind": str(self.kind), "rank": self.rank, "bits": self.bits}

    def __str__(self) -> str:
        """In a few words, as reports show it."""
        if self.kind is Kind.WHOLE:
            return f"{self.kind} {self.bits} bits"
        return f"{self.kind} {self.rank}"

    @property
    def factored(self) -> bool:
        """Whether it is the product of two factors."""
        return self.kind is not Kind.WHOLE

    @property
    def roles(self) -> dict[str, Role]:
        """The roles of its tensors by name, in the order in which they run."""
        return {
            Kind.LOW_RANK: {"a": Role.FILTERS, "b": Role.POINTWISE},
            Kind.SHARED_BASIS: {"a": Role.MATRIX, "b": Role.MATRIX},
            Kind.WHOLE: {"a": Role.FILTERS},
        }[self.kind]

    @property
    def runs_merged(self) -> bool:
        """Whether its tensors run as one kernel, not each as a layer of its own."""
        return Role.MATRIX in self.roles.values()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its tensors by name.

        * low-rank: `a` [g·r, n/g, *kernel] and `b` [m, r, 1…] (linear: [r, n], [m, r]);
        * shared-basis: `a` [r, k] and `b` [m, r];
        * whole: `a` [m, n/g, *kernel].
        """
        rows, *inner = self.weight_shape
        if self.kind is Kind.WHOLE:
            return {"a": self.weight_shape}
        if self.kind is Kind.SHARED_BASIS:
            return {"a": (self.rank, math.prod(inner)), "b": (rows, self.rank)}
        ones = [1] * (len(inner) - 1)
        return {"a": (self.groups * self.rank, *inner), "b": (rows, self.rank, *ones)}

    def scales_channels(self, name: str) -> bool:
        """Whether a tensor has a scale a leading channel; else it has one in all.

        A scale a row of B would cost as much as several ranks do. Instead the sizes of
        its columns, one a rank, stand in the scales of A.
        """
        return name == "a"

    @property
    def scale_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the scales of its tensors by name; none of float ones."""
        if self.bits == FLOAT_BITS:
            return {}
        return {
            name: (
                shape[0] if self.scales_channels(name) else 1,
                *[1] * (len(shape) - 1),
            )
            for name, shape in self.shapes.items()
        }

    @property
    def parameters(self) -> int:
        """Number of stored values and scales."""
        return self._values + self._scales

    @property
    def _values(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def _scales(self) -> int:
        return sum(map(math.prod, self.scale_shapes.values()))

    def cost(self, outputs: int = 1, slides: int | None = None) -> Cost:
        """What it costs beside a layer.

        Args:
            outputs: The layer's output positions.
            slides: The positions at which its filters are applied; None: its outputs,
                as of all but transposed convolutions, which slide over their input.
        """
        bits = self.bits * self._values + FLOAT_BITS * self._scales
        slides = outputs if slides is None else slides
        macs = math.prod(self.weight_shape) * slides
        if not self.runs_merged:
            macs = sum(
                math.prod(self.shapes[name])
                * (outputs if role is Role.POINTWISE else slides)
                for name, role in self.roles.items()
            )
        return Cost(self.parameters, bits, macs)

    def values(self, residual: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """The tensors of this form for a residual, by name.

        Args:
            residual: [m, n/g, *kernel] or [m, n].
            a: Its first factors of this rank, [g, r, k]; depthwise [1, r, k].
            b: Its second factors, [g, m/g, r]; depthwise [1, m, r].
        """
        held = {"a": a, "b": b} if self.factored else {"a": residual}
        return {name: held[name].reshape(shape) for name, shape in self.shapes.items()}

    def quantize(self, values: Mapping[str, Tensor]) -> dict[str, QuantizedTensor]:
        """Quantize the values of its tensors, by name."""
        # What a whole term holds is an error of rounding, which is spread evenly.
        even = self.kind is Kind.WHOLE
        return {
            name: quantize(values[name], self.bits, self.scales_channels(name), even)
            for name in self.shapes
        }

    def merged(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The weight that has the effect of its tensors, [m, n/g, *kernel]."""
        if not self.factored:
            return stored["a"]
        groups = 1 if self.runs_merged else self.groups
        rows = stored["a"].reshape(groups, self.rank, -1)  # [g, r, k]
        columns = stored["b"].reshape(groups, -1, self.rank)  # [g, m/g, r]
        return (columns @ rows).reshape(self.weight_shape)

    def run(
        self, operation: Operation, x: Tensor, stored: Mapping[str, Tensor]
    ) -> Tensor:
        """What it adds to the output of a layer that applies `operation` to `x`."""
        if self.runs_merged:
            # One operator in exported files, and none that onnxruntime before 1.28
            # fuses with its constants, whose scales it reads for columns, not rows.
            kernel = torch.einsum("mr,rk->mk", stored["b"], stored["a"])
            return operation(x, kernel.reshape(self.weight_shape))
        applied = {Role.FILTERS: operation, Role.POINTWISE: operation.pointwise()}
        for name, role in self.roles.items():
            x = applied[role](x, stored[name])
        return x


def is_depthwise(weight_shape: tuple[int, ...], groups: int) -> bool:
    """Whether each group sees one input channel, so that its matrix has rank 1."""
    return groups > 1 and weight_shape[1] == 1


def residual_matrices(residual: Tensor, groups: int) -> Tensor:
    """The matrices that are factored: [g, m/g, k], or [1, m, k] when depthwise."""
    if is_depthwise(tuple(residual.shape), groups):
        groups = 1
    return residual.reshape(groups, residual.shape[0] // groups, -1)


def full_rank(weight_shape: tuple[int, ...], groups: int) -> int:
    """Largest useful rank of the matrices of `residual_matrices`."""
    rows, *inner = weight_shape
    if not is_depthwise(weight_shape, groups):
        rows //= groups
    return min(rows, math.prod(inner))
