"""The linear operation of a layer, independent of any toolkit."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cora_plugin.adapters.exact import exact_device

PLAIN = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Modules of torch that hold the weight of their one call, and can be quantized."""

Padding = tuple[tuple[int, int], ...] | Literal["same"]

_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_PAD_MODE = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "replicate",
    "circular": "circular",
}


@dataclass(frozen=True)
class Operation:
    """A convolution over `dimensions` spatial axes, or a linear layer when it is 0.

    `padding` gives (before, after) of every axis, or "same": as much as keeps
    `ceil(size / stride)` positions, the odd one after.

    A `transposed` convolution spreads its input, `stride` apart, and drops `padding`
    positions at both ends but for `output_padding` at the far one. Its weight is
    [m, n/g, *kernel] here, as that of any convolution; `layout` tells torch's.
    """

    dimensions: int = 0
    stride: tuple[int, ...] = ()
    padding: Padding = ()
    padding_mode: str = "zeros"
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def _sides(self) -> tuple[tuple[int, int], ...]:
        """The padding of a transposed convolution, which is never "same"."""
        return () if self.padding == "same" else self.padding

    def layout(self, weight: Tensor) -> Tensor:
        """From [m, n/g, *kernel] to the layout of torch's layer, and back.

        Layers of transposed convolutions hold [n, m/g, *kernel], all others the same.
        """
        if not self.transposed:
            return weight
        if self.groups == 1:
            return weight.transpose(0, 1)
        split = weight.reshape(self.groups, -1, *weight.shape[1:])
        return split.transpose(1, 2).reshape(-1, split.shape[1], *weight.shape[2:])

    def pad(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Pad `x` [N, n, *size] as the operation does before it slides."""
        sides = self.padding
        if sides == "same":
            sides = tuple(
                _same(size, *axis)
                for size, *axis in zip(
                    x.shape[2:], kernel, self.stride, self.dilation, strict=True
                )
            )
        if not any(map(any, sides)):
            return x
        flat = [side for axis in reversed(sides) for side in axis]
        return F.pad(x, flat, mode=_PAD_MODE[self.padding_mode])

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the bias-free operation with `weight` to `x`."""
        if not self.dimensions:
            return F.linear(x, weight)
        if self.transposed:
            output: Tensor = _TRANSPOSED[self.dimensions](
                x,
                self.layout(weight),
                None,
                self.stride,
                [before for before, _ in self._sides],
                self.output_padding,
                self.groups,
                self.dilation,
            )
            return output
        convolve = _CONVOLUTION[self.dimensions]
        return convolve(
            self.pad(x, tuple(weight.shape[2:])),
            weight,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )

    def pointwise(self) -> "Operation":
        """The operation that mixes channels only, at this one's output."""
        ones = (1,) * self.dimensions
        none = ((0, 0),) * self.dimensions
        return replace(
            self,
            stride=ones,
            padding=none,
            padding_mode="zeros",
            dilation=ones,
            transposed=False,
            output_padding=(),
        )

    def spread(self, x: Tensor, kernel: tuple[int, ...]) -> tuple[Tensor, "Operation"]:
        """A transposed convolution's input with zeros between and around its values.

        Returns:
            What a plain convolution slides over to the same end, its kernel turned
            round, and that convolution.
        """
        between = tuple(slice(None, None, step) for step in (1, 1, *self.stride))
        size = [
            (n - 1) * step + 1 for n, step in zip(x.shape[2:], self.stride, strict=True)
        ]
        wide = x.new_zeros(*x.shape[:2], *size)
        wide[between] = x
        axes = zip(kernel, self.dilation, self._sides, self.output_padding, strict=True)
        sides = tuple(
            (reach * (length - 1) - before, reach * (length - 1) - after + more)
            for length, reach, (before, after), more in axes
        )
        ones = (1,) * self.dimensions
        return wide, Operation(
            self.dimensions, ones, sides, "zeros", self.dilation, self.groups
        )

    def output_size(self, x: Tensor, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of a transposed convolution's output for an input [N, n, *size]."""
        axes = zip(
            x.shape[2:],
            kernel,
            self.stride,
            self.dilation,
            self._sides,
            self.output_padding,
            strict=True,
        )
        return tuple(
            (n - 1) * step - before - after + reach * (length - 1) + more + 1
            for n, length, step, reach, (before, after), more in axes
        )

    def matrices(self, weight: Tensor) -> Tensor:
        """View `weight` [m, n/g, *kernel] as one matrix a group, [g, m/g, k]."""
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    outputs = math.ceil(size / stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def patches(
    x: Tensor,
    operation: Operation,
    kernel: tuple[int, ...],
    step: int = 1,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Unfold `x` to the columns that the operation multiplies with its weight.

    Args:
        x: Input, [N, n, *size]; for a linear layer [..., n].
        operation: The layer's operation.
        kernel: Its kernel size, one number an axis.
        step: Keep every `step`-th output position along each axis, one position of a
            shorter axis.
        start: Which of these grids: as it counts up, the offset along the last axis
            grows first, then that along the axis before, and so on.
        dtype: Of the result, by default that of `x`; converting here costs no copy. A
            float64 result is on the CPU where the device of `x` has none.

    Returns:
        [g, positions, k] with k = (n/g)·Π kernel, in the order of the flattened weight.
    """
    home = exact_device(x.device) if dtype is torch.float64 else x.device
    if not operation.dimensions:
        rows = x.reshape(len(x), -1, x.shape[-1])
        every = min(step, rows.shape[1])
        kept = rows[:, start % every :: every].to(home).to(dtype or x.dtype)
        return kept.reshape(1, -1, x.shape[-1])
    axes = operation.dimensions
    turned = operation.transposed
    if turned:
        x, operation = operation.spread(x, kernel)
    x = operation.pad(x, kernel)
    batch, channels, *size = x.shape
    outer, channel, *inner = x.stride()
    counts, strides, offset = [0] * axes, [0] * axes, x.storage_offset()
    for axis in reversed(range(axes)):
        stride, dilation = operation.stride[axis], operation.dilation[axis]
        outputs = (size[axis] - dilation * (kernel[axis] - 1) - 1) // stride + 1
        every = min(step, outputs)
        start, first = divmod(start, every)
        counts[axis] = -(-(outputs - first) // every)
        strides[axis] = inner[axis] * stride * every
        offset += inner[axis] * stride * first
    dilated = [i * d for i, d in zip(inner, operation.dilation, strict=True)]
    groups = operation.groups
    per_group = channels // groups
    # The windows are a view, [N, g, n/g, *positions, *kernel]: only the positions that
    # are kept are ever copied.
    view = x.as_strided(
        [batch, groups, per_group, *counts, *kernel],
        [outer, channel * per_group, channel, *strides, *dilated],
        offset,
    )
    # Positions stay innermost, [g, n/g, *kernel, N, *positions]: a copy along memory is
    # several times as fast as one across it, and a product takes either transpose.
    order = [1, 2, *range(3 + axes, 3 + 2 * axes), 0, *range(3, 3 + axes)]
    view = view.permute(order)
    if turned:
        view = view.flip(tuple(range(2, 2 + axes)))
    columns = view.to(home).to(dtype or x.dtype, memory_format=torch.contiguous_format)
    return columns.reshape(groups, per_group * math.prod(kernel), -1).mT


def output_rows(output: Tensor, operation: Operation) -> Tensor:
    """A layer's output (or its gradient), a row a position: [N, g, positions, m/g]."""
    if not operation.dimensions:
        rows = output.reshape(output.shape[0], 1, -1, output.shape[-1])
        return rows
    groups = operation.groups
    flat = output.flatten(2)  # [N, m, positions]
    split: Tensor = flat.unflatten(1, (groups, flat.shape[1] // groups))
    return split.transpose(2, 3)


def first_nonfinite(x: Tensor) -> str | None:
    """What is not finite in `x`: "NaN", else "inf"; None if all values are finite."""
    if torch.isfinite(x).all():
        return None
    return "NaN" if torch.isnan(x).any() else "inf"
