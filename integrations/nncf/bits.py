"""Bit widths that NNCF refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import Tensor

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.integrations.nncf import private


@contextmanager
def allow_bits(*bits: int) -> Iterator[None]:
    """Within it `nncf.quantize` takes `num_bits` that its hardware tables do not list.

    >>> with allow_bits(4):
    ...     nncf.quantize(
    ...         model,
    ...         dataset,
    ...         advanced_parameters=AdvancedQuantizationParameters(
    ...             weights_quantization_params=QuantizationParameters(num_bits=4)
    ...         ),
    ...     )

    Raises:
        ConfigError: A width is not from 2 to 8.
    """
    for width in bits:
        check_bits("allow_bits", width)
    with private.more_widths(bits):
        yield


def check_bits(name: str, bits: Any) -> None:
    """Refuse a bit width that NNCF's quantizers do not have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError((name,), f"{bits!r} bits are out of range; use 2 to 8")


FEW = 4
"""At so many bits and fewer a range may clip a part of the weights."""


def set_bits(quantizer: Any, bits: int, weight: Tensor | None = None) -> None:
    """Give a quantizer another bit width.

    Args:
        quantizer: A quantizer of NNCF.
        bits: The new width.
        weight: What it quantizes, to cover from its minimum to its maximum, for a range
            chosen for few bits may clip; None, and few bits in place of few, keep the
            range.
    """
    with torch.no_grad():
        low, high = quantizer.get_input_low_input_high()
        few = max(bits, quantizer.num_bits) <= FEW
        if weight is not None and not few:
            low = _reduced(weight, low, torch.amin)
            high = _reduced(weight, high, torch.amax)
        quantizer.num_bits = bits
        private.set_bits_of_config(quantizer, bits)
        if isinstance(quantizer, SymmetricQuantizer):
            # Its scale is the highest level's value; from -8 to 7 the lowest is larger.
            scale = high
            if quantizer.signed:
                top, bottom = quantizer.level_high, quantizer.level_low
                scale = torch.maximum(low.abs(), high.abs()) * (top / -bottom)
            quantizer.scale.data.copy_(scale)
        else:
            low, high = low.clamp_max(0), high.clamp_min(0)
            quantizer.input_low.data.copy_(low)
            quantizer.input_range.data.copy_(high - low)


def _reduced(weight: Tensor, like: Tensor, function: Any) -> Tensor:
    """Reduce over the dimensions that a scale does not have."""
    if like.numel() == 1:
        return function(weight).reshape(like.shape)  # type: ignore[no-any-return]
    axes = [axis for axis, size in enumerate(like.shape) if size == 1]
    return function(weight, axes, keepdim=True)  # type: ignore[no-any-return]
