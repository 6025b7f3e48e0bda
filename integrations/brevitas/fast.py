"""The same activation quantization, faster, while the algorithm runs the model often.

Brevitas quantizes an activation in a dozen passes over memory; with a static scale one
fused kernel does. Each replacement is checked against the original before it is used.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, nn

Quantize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@torch.no_grad()
def fused_activations(model: nn.Module) -> Iterator[tuple[nn.Module, Quantize]]:
    """Find a model's static activation quantizers and a fused kernel for each.

    The model must be in evaluation mode, so that scales are not updated.

    Yields:
        The Brevitas module and the function to answer its `forward` with.
    """
    for proxy in model.modules():
        if not isinstance(proxy, ActQuantProxyFromInjectorBase):
            continue
        if not proxy.is_quant_enabled or proxy.fused_activation_quant_proxy is None:
            continue
        quantizer = proxy.fused_activation_quant_proxy.tensor_quant
        # Exactly these types: a subclass may round or clamp in its own way.
        if type(quantizer) is not RescalingIntQuant:
            continue
        if type(quantizer.int_quant) is not IntQuant:
            continue
        kernel = _fused(quantizer)
        if kernel is not None:
            yield quantizer, kernel


def _fused(quantizer: Any) -> Quantize | None:
    """A fused kernel that agrees with a quantizer, or None if there is none."""
    zeros = torch.zeros(1, 1, 1, 1)
    try:
        _, scale, zero_point, bit_width = quantizer(zeros)
        span = float(scale) * 2 ** float(bit_width)
        probe = torch.linspace(-span, span, 1023).reshape(1, 1, 1, -1)
        expected, other_scale, other_zero_point, _ = quantizer(probe)
    except (RuntimeError, ValueError):
        return None  # a scale a channel, or one for an input of another shape
    if not torch.equal(scale, other_scale) or zero_point.numel() != 1:
        return None  # a dynamic scale
    if not torch.equal(zero_point, other_zero_point):
        return None
    low = int(quantizer.int_quant.min_int(bit_width))
    high = int(quantizer.int_quant.max_int(bit_width))
    step, offset = float(scale), int(zero_point)
    if not low <= offset <= high:
        return None

    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = torch.fake_quantize_per_tensor_affine(x, step, offset, low, high)
        return y, scale, zero_point, bit_width

    # Multiplying by 1/scale may round a tie the other way: a step apart at most, and
    # hardly ever.
    apart = (quantize(probe)[0] - expected).abs() > step / 2
    return None if apart.double().mean() > 0.01 else quantize
