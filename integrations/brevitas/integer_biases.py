"""Finds biases that no file of integers can hold, before the work and not after it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from brevitas.quant_tensor import IntQuantTensor
from torch import nn

from cora_plugin.integrations.brevitas.layers import unpack
from cora_plugin.integrations.brevitas.private import (
    INNER_FORWARD,
    QuantWeightBiasInputOutputLayer,
)
from cora_plugin.integrations.scopes import replaced

Tell = Callable[[str], None]


def has_integer_biases(model: nn.Module) -> bool:
    """Whether a layer of the model quantizes its bias."""
    return any(
        isinstance(layer, QuantWeightBiasInputOutputLayer)
        and layer.bias is not None
        and layer.bias_quant.is_quant_enabled
        for layer in model.modules()
    )


@contextmanager
def watched_biases(model: nn.Module, tell: Tell) -> Iterator[None]:
    """Within it a run of the model tells of each bias that is no integer in float32.

    Args:
        model: The model.
        tell: Called with what is wrong, and the way out; it may raise.
    """
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, QuantWeightBiasInputOutputLayer):
                watched = _watched(name, getattr(layer, INNER_FORWARD), tell)
                stack.enter_context(replaced(layer, INNER_FORWARD, watched))
        yield


def _watched(name: str, inner: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    def inner_forward_impl(x: Any, quant_weight: Any, quant_bias: Any) -> Any:
        if isinstance(quant_bias, IntQuantTensor) and not quant_bias.is_valid:
            smallest = float(unpack(quant_weight).abs().flatten(1).amax(1).min())
            tell(
                f"{name}: its bias cannot be stored as integers: where a channel's "
                f"weights are almost nothing (here {smallest:.1g} at most), the bias "
                "is more steps of their scale than float32 can count; keep it float: "
                "quantize with bias_bit_width=None, or set "
                f'model.get_submodule("{name}").bias_quant.disable_quant = True'
            )
        return inner(x, quant_weight, quant_bias)

    return inner_forward_impl
