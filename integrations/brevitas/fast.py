"""The same activation quantization, faster, where activations are quantized often.

Brevitas quantizes an activation in a dozen passes over memory, each into a tensor of
its own; with a static scale they fit into one tensor, and the gradient into one pass.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.integrations.brevitas import private
from cora_plugin.integrations.straight import straight_through

Quantize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]

CACHED = 2**17
"""Values of an activation that are worked on at a time, so that a CPU's cache holds
them; but no less than a sample."""


@torch.no_grad()
def fused_activations(model: nn.Module) -> Iterator[tuple[nn.Module, Quantize]]:
    """Find a model's static activation quantizers and a faster form of each.

    Each gives the same values as the original, which is checked, and the same
    straight-through gradient. The model must be in evaluation mode, so that scales are
    not updated.

    Yields:
        The Brevitas module and the function to answer its `forward` with.
    """
    for quantizer in private.integer_activations(model):
        quantize = _fused(quantizer)
        if quantize is not None:
            yield quantizer, quantize


def _fused(quantizer: Any) -> Quantize | None:
    """A faster form that agrees with a quantizer, or None if there is none."""
    held = next(chain(quantizer.parameters(), quantizer.buffers()), torch.zeros(()))
    device = held.device
    zeros = torch.zeros(1, 1, 1, 1, device=device)
    try:
        _, scale, zero_point, bit_width = quantizer(zeros)
        span = float(scale) * 2 ** float(bit_width)
        probe = torch.linspace(-span, span, 1023, device=device).reshape(1, 1, 1, -1)
        expected, other_scale, other_zero_point, _ = quantizer(probe)
    except (RuntimeError, ValueError):
        return None  # a scale a channel, or one for an input of another shape
    if not torch.equal(scale, other_scale) or zero_point.numel() != 1:
        return None  # a dynamic scale
    if not torch.equal(zero_point, other_zero_point):
        return None
    low, high = private.integer_range(quantizer, bit_width)
    offset = float(zero_point)
    bounds = [float(scale) * (edge - offset) for edge in (low - 0.5, high + 0.5)]
    # A GPU divides by a number as it multiplies by its reciprocal, an ulp off.
    step = float(scale) if device.type == "cpu" else scale

    rounded = partial(_rounded, step=step, offset=offset, low=low, high=high)

    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = straight_through(x, rounded, *bounds)
        return y, scale, zero_point, bit_width

    return quantize if torch.equal(quantize(probe)[0], expected) else None


def _rounded(
    x: Tensor, step: float | Tensor, offset: float, low: float, high: float
) -> Tensor:
    """Quantized to integers of `low` to `high`, in Brevitas' order of operations."""
    y = x / step
    if offset:
        y.add_(offset).round_().clamp_(low, high).sub_(offset)
    else:
        y.round_().clamp_(low, high)
    return y.mul_(step)


@contextmanager
def fast_range_searches(model: nn.Module) -> Iterator[None]:
    """Within it searches of activation ranges by squared error take less time.

    Brevitas quantizes an activation in its usual way for each of 20 candidates of the
    scale, and of the zero point. The candidates are the same, and so are their errors,
    up to the order of summation.
    """
    with ExitStack() as stack:
        for quantizer in private.integer_activations(model):
            error = partial(_squared_error, quantizer)
            for search in private.range_searches(quantizer):
                stack.enter_context(private.measured_by(search, quantizer, error))
        yield


def _squared_error(
    quantizer: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: Tensor
) -> Tensor:
    """Squared error of x [N, …], quantized with one scale and zero point."""
    low, high = private.integer_range(quantizer, bits)
    numbers = {"step": float(scale), "offset": float(zero_point)}
    samples = len(x)
    if x.device.type == "cpu":
        samples = max(1, CACHED * samples // max(1, x.numel()))
    return torch.stack(
        [
            _rounded(part, **numbers, low=low, high=high).sub_(part).square_().sum()
            for part in x.split(samples)
        ]
    ).sum()
