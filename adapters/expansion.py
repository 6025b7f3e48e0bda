"""Low-bit series of a tensor, and of the product of a layer's weight and its input.

FP=xINT (arXiv 2412.06865), section 3: `M ≈ M_sa + offset + Σ scale_i M_i`, each `M_i`
of X-bit integers, and the error falls by `2^X` with each term. No data is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.exact import exact
from cora_plugin.adapters.operation import Operation
from cora_plugin.adapters.quantized import QuantizedTensor


@dataclass(frozen=True)
class Series:
    """A tensor as `saturated + offset + Σ terms`.

    * `saturated`: what lies outside the range of the terms, sparse, in the tensor's
      shape;
    * `offset`: a constant a channel, [c, 1, …], float64;
    * `terms`: integers with scales, the largest first; each term's scale is `2^bits`
      times the next one's.
    """

    saturated: Tensor
    offset: Tensor
    terms: tuple[QuantizedTensor, ...]

    def sum(self, terms: int | None = None) -> Tensor:
        """The tensor that the first terms stand for, in float64; None: all."""
        found = self.saturated.to_dense() + self.offset
        for term in self.terms[:terms]:
            found = found + _value(term)
        return found

    def parts(self) -> Iterator[Tensor]:
        """Tensors that add up to the sum: one a term, all else with the first."""
        first, *others = self.terms
        yield replace(self, terms=(first,)).sum()
        for term in others:
            yield _value(term)

    @property
    def bound(self) -> Tensor:
        """What no element's error exceeds: half the last scale, [c, 1, …], float64."""
        return _scale(self.terms[-1]) / 2

    @property
    def bits(self) -> int:
        """Stored bits of the terms, scales counted; without what saturates."""
        return sum(term.stored_bits for term in self.terms)


def expand(
    tensor: Tensor,
    bits: int,
    terms: int,
    channels: bool = True,
    ends: tuple[float, float] | None = None,
) -> Series:
    """Expand a tensor into a series of integers (FP=xINT, eq. 3).

    A term rounds down to one of `2^bits` even steps and the offset holds half a step of
    each, so that what a term leaves fits exactly into the next one's range.

    Args:
        tensor: [c, …], finite.
        bits: X, the bit width of every term, 2 to 8.
        terms: Their number, 1 or more.
        channels: Whether each leading channel has scales and an offset of its own.
        ends: The range of the terms; what is outside goes to `saturated`. None: all of
            each channel is within.

    Raises:
        CoRaError: An argument is out of range, or the tensor is not finite.
    """
    counted = isinstance(bits, int) and isinstance(terms, int)
    ordered = ends is None or ends[0] < ends[1]
    if not (counted and 2 <= bits <= 8 and terms >= 1 and ordered):
        raise CoRaError(
            f"expand: bits={bits}, terms={terms}, ends={ends}; pass 2 to 8 bits, one "
            "term or more, and a lower end before a higher one"
        )
    if not tensor.ndim or not bool(torch.isfinite(tensor).all()):
        what = "is not finite" if tensor.ndim else "has no dimension; pass [c, …]"
        raise CoRaError(f"expand: the tensor {what}")
    values, levels = exact(tensor), 2**bits
    inside = values if ends is None else values.clamp(*ends)
    rows = inside.flatten(1) if channels else inside.reshape(1, -1)
    ones = [1] * (values.ndim - 1)
    low, high = (each.view(-1, *ones) for each in torch.aminmax(rows, dim=1))
    if ends is not None:
        low, high = (torch.full_like(low, end) for end in ends)
    offset = (low + high) / 2
    # So wide that the last scale is a normal float32, where all values are the same.
    least = torch.finfo(torch.float32).smallest_normal * levels**terms
    scale = ((high - low).clamp(min=least) / levels).float()
    # One that was rounded down to float32 would leave values outside.
    scale = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    left = inside - offset
    found: list[QuantizedTensor] = []
    for _ in range(terms):
        step = exact(scale)
        floors = (left / step).floor().clamp(-levels // 2, levels // 2 - 1)
        found.append(QuantizedTensor(floors.to(torch.int8), scale, bits))
        offset = offset + step / 2
        left = left - (floors + 0.5) * step
        scale = scale / levels  # Exact: a power of two.
    return Series((values - inside).to_sparse(), offset, tuple(found))


@dataclass(frozen=True)
class SeriesProduct:
    """A layer of a weight's series, applied to the series of its input.

    `W ∗ x ≈ Σ_i Σ_j s_i t_j (W_i ∗ x_j)`, with all cross products of terms or those up
    to an order, `i + j < order` (FP=xINT, eq. 5). Offsets and saturated parts belong to
    the first terms. Terms may be added in any order.

    Args:
        operation: What the layer does with a weight.
        weight: The weight's series.
        bits: Bit width of the input's terms.
        terms: Their number.
        ends: The input's range (static); None: each batch's own (dynamic).
        order: Which cross products there are; None: all.
    """

    operation: Operation
    weight: Series
    bits: int
    terms: int
    ends: tuple[float, float] | None = None
    order: int | None = None

    def products(self, x: Tensor) -> Iterator[Tensor]:
        """The summands for an input [N, …], in the order of their size."""
        series = expand(x, self.bits, self.terms, channels=False, ends=self.ends)
        inputs, weights = list(series.parts()), list(self.weight.parts())
        pairs = product(range(len(weights)), range(len(inputs)))
        for i, j in sorted(pairs, key=sum):
            if self.order is None or i + j < self.order:
                yield self.operation(inputs[j].to(x), weights[i].to(x))

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of all products."""
        return torch.stack(list(self.products(x))).sum(0)


def _scale(term: QuantizedTensor) -> Tensor:
    return exact(torch.ones(()) if term.scale is None else term.scale)


def _value(term: QuantizedTensor) -> Tensor:
    return exact(term.values) * _scale(term)
