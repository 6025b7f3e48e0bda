"""Symmetric quantization of what an adapter stores."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cora_plugin.adapters.exact import exact

FLOAT_BITS = 32


@dataclass(frozen=True)
class QuantizedTensor:
    """Integers and their scales, `values · scale`; scale None means plain float32.

    `values` is int8 [c, …]; `scale` float32 [c, 1, …], one a leading channel, or
    [1, 1, …].
    """

    values: Tensor
    scale: Tensor | None
    bits: int

    def dequantize(self) -> Tensor:
        """The float32 tensor."""
        if self.scale is None:
            return self.values
        return self.values.float() * self.scale

    def scaled(self, share: float) -> "QuantizedTensor":
        """The same values, times a number: in the scale, if there is one."""
        if self.scale is None:
            return replace(self, values=self.values * share)
        return replace(self, scale=self.scale * share)

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return self.values.numel()

    @property
    def stored_bits(self) -> int:
        """Bits of values and scales together."""
        scales = 0 if self.scale is None else self.scale.numel()
        return self.bits * self.parameters + FLOAT_BITS * scales


def quantize(
    tensor: Tensor, bits: int, channels: bool = True, even: bool = False
) -> QuantizedTensor:
    """Quantize to `bits` in the narrow range ±(2^(bits−1) − 1).

    There is one scale a leading channel, or without `channels` one in all. It is the
    largest magnitude over the largest level, so quantizing the dequantized tensor again
    gives the same integers. 32 bits keep float32.

    Values that are spread evenly, as the errors of rounding are, lose less where the
    largest ones round down by half a level: with 2 bits 2.25 times less in squares.

    Args:
        tensor: [c, …].
        bits: 2 to 8, or 32.
        channels: Whether each leading channel has its own scale.
        even: Whether a channel may have the scale for evenly spread values, where its
            squared error is the smaller. (Dequantized values have none at the other.)
    """
    if bits == FLOAT_BITS:
        return QuantizedTensor(tensor.float(), None, bits)
    top = 2 ** (bits - 1) - 1
    values = exact(tensor)
    largest = values.flatten(1).abs().amax(1)
    if not channels:
        largest = largest.amax(0, keepdim=True)
    # The scale of a channel of zeros, or of less than float32 can scale, is arbitrary.
    smallest = (top + 1) * torch.finfo(torch.float32).smallest_normal
    largest = torch.where(largest < smallest, torch.ones_like(largest), largest)
    ones = [1] * (tensor.ndim - 1)
    levels, scale = _rounded(values, (largest / top).view(-1, *ones), top)
    if even:
        other = _rounded(values, (largest / (top + 0.5)).view(-1, *ones), top)
        first, second = (
            (values - each * step.double()).flatten(1).square().sum(1)
            for each, step in ((levels, scale), other)
        )
        if len(scale) == 1:
            first, second = first.sum(0, True), second.sum(0, True)
        better = (second < first).view(-1, *ones)
        levels = torch.where(better, other[0], levels)
        scale = torch.where(better, other[1], scale)
    return QuantizedTensor(levels.to(torch.int8), scale, bits)


def _rounded(values: Tensor, scale: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Levels in ±top, and the scale in float32, which they are rounded with."""
    stored = scale.float()
    return (values / stored.double()).round().clamp(-top, top), stored
