"""Straight-through gradients at the cost of one pass over memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def straight_through(
    x: Tensor,
    quantize: Callable[[Tensor], Tensor],
    low: float | Tensor,
    high: float | Tensor,
) -> Tensor:
    """`quantize(x)`, whose gradient passes unchanged where x is within (low, high).

    Args:
        x: Activations.
        quantize: Rounds and clips; is not followed by autograd.
        low: Below it x is clipped; a number, or a tensor that goes with x.
        high: Above it x is clipped.
    """
    result: Tensor = _StraightThrough.apply(x, quantize, low, high)
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Any, low: Any, high: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        result: Tensor = quantize(x)
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (slope,), (low, high) = ctx.saved_tensors, slopes, ctx.bounds
        if isinstance(low, float):  # A mask would be two more passes.
            slope = torch.ops.aten.hardtanh_backward(slope, x, low, high)
        else:
            slope = slope.masked_fill((x <= low) | (x >= high), 0)
        return slope, None, None, None
