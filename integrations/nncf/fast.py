"""NNCF's quantization of activations, faster, while the algorithm runs the model often.

NNCF's extension allocates three tensors an activation, and twice as many for its
gradient; with fixed ranges one tensor, and one pass for the gradient, are enough.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from nncf.torch.quantization.layers import (
    AsymmetricQuantizer,
    SymmetricQuantizer,
)
from torch import Tensor, nn

from cora_plugin.integrations.nncf.private import (
    TuneRange,
    maybe_get_values_from_torch_return_type,
    maybe_wrap_to_torch_return_type,
)
from cora_plugin.integrations.straight import straight_through

Quantize = Callable[[Any], Any]
"""From a tensor, or what pooling with indices returns, to the same quantized."""


@torch.no_grad()
def fused_quantizers(model: nn.Module) -> Iterator[tuple[nn.Module, Quantize]]:
    """Find a model's quantizers of float32 activations and a faster form of each.

    Each gives the same values as the original, which is checked, and the same
    gradient of its input. The ranges must stay as they are.

    Yields:
        The quantizer and the function to answer its `forward` with.
    """
    quantizer: Any
    for quantizer in model.modules():
        # Exactly these types: a subclass may round or clamp in its own way.
        if type(quantizer) not in (SymmetricQuantizer, AsymmetricQuantizer):
            continue
        if not quantizer.is_enabled_quantization():
            continue
        low, span = range_of(quantizer)
        if low.dtype != torch.float32 or low.shape[0] != 1:
            continue  # Of a weight: a range for each of its outputs.
        quantize = _fused(low, span, quantizer.levels, quantizer.forward)
        shape = [-1] + [1] * (low.ndim - 1)
        probe = low + span * torch.linspace(-0.5, 1.5, 1023).to(low).view(shape)
        if torch.equal(quantize(probe), quantizer(probe)):
            yield quantizer, quantize


def range_of(quantizer: Any) -> tuple[Tensor, Tensor]:
    """The lowest value and the range, as NNCF hands them to its extension."""
    if isinstance(quantizer, SymmetricQuantizer):
        scale = quantizer.scale.abs() + quantizer.eps
        low = scale * (quantizer.level_low / quantizer.level_high)
        return low, scale - low
    span = quantizer.input_range.abs() + quantizer.eps
    low, span = TuneRange.apply(quantizer.input_low, span, quantizer.levels)
    return low, span


def _fused(low: Tensor, span: Tensor, levels: int, original: Quantize) -> Quantize:
    """Clip to the range, round to its levels, in NNCF's order of operations.

    Activations of other types than the range's are left to the original.
    """
    # A number over a tensor would be its reciprocal times the number, an ulp off.
    high, steps = low + span, torch.full_like(span, levels - 1) / span
    zero_point = (-low * steps).round()
    from_zero = not (low.any() or zero_point.any())
    # NNCF passes the gradient at the bounds themselves.
    below = torch.nextafter(low, torch.full_like(low, -torch.inf))
    above = torch.nextafter(high, torch.full_like(high, torch.inf))
    numbers: Any = (low, high, steps, zero_point, below, above)
    # A GPU divides by a number as it multiplies by its reciprocal, an ulp off.
    if low.numel() == 1 and low.device.type == "cpu":
        numbers = map(float, numbers)
    lowest, highest, steps, zero_point, below, above = numbers

    def rounded(x: Tensor) -> Tensor:
        y = x.clamp(lowest, highest)
        if from_zero:
            return y.mul_(steps).round_().div_(steps)
        return y.sub_(lowest).mul_(steps).sub_(zero_point).round_().div_(steps)

    def quantize(given: Any) -> Any:
        x = maybe_get_values_from_torch_return_type(given)
        if x.dtype != low.dtype:
            return original(given)
        # Not traced: the steps are none of NNCF's business, and cost time there.
        with torch._C.DisableTorchFunction():
            y = straight_through(x, rounded, below, above)
        return maybe_wrap_to_torch_return_type(y, given)

    return quantize
