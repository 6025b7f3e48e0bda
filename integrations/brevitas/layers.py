"""Reads a Brevitas model: which layers are quantized, and their two weights."""

import math
from collections.abc import Mapping
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from cora_plugin.adapters import Operation
from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.operation import PLAIN, Padding
from cora_plugin.adapters.quantized import FLOAT_BITS
from cora_plugin.host import LEFT_FLOAT
from cora_plugin.integrations.brevitas.order import bias_corrected
from cora_plugin.integrations.brevitas.private import (
    INNER_FORWARD,
    QuantWeightBiasInputOutputLayer,
    is_same_padded,
    kept_weight,
    lacks_input,
)
from cora_plugin.integrations.computed import computed
from cora_plugin.integrations.host import given_weight
from cora_plugin.layer import QuantizedLayer

Reference = nn.Module | Mapping[str, Tensor]
"""Float weights by layer name, or the float model that has them."""

SUPPORTED = {
    qnn.QuantLinear: 0,
    qnn.QuantConv1d: 1,
    qnn.QuantConv2d: 2,
    qnn.QuantConv3d: 3,
    qnn.QuantConvTranspose1d: 1,
    qnn.QuantConvTranspose2d: 2,
    qnn.QuantConvTranspose3d: 3,
}
"""Layer types and their spatial dimensions."""


def unpack(value: Tensor | QuantTensor) -> Tensor:
    """The dequantized tensor of a Brevitas QuantTensor, or the tensor itself."""
    return value.value if isinstance(value, QuantTensor) else value


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy the float weights of a model that was just quantized, by layer name.

    Take it right after `quantize_model`, once BN merging and equalization have moved
    the weights and before GPTQ, GPFQ or Qronos overwrite them; then pass it as
    `reference`. Each layer's bias goes with it, as `<name>.bias`: it tells when bias
    correction has run too early.
    """
    copied = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantWeightBiasInputOutputLayer):
            copied[name] = layer.weight.detach().clone()
            copied[f"{name}.bias"] = _bias(layer).clone()
    return copied


def _bias(layer: Any) -> Tensor:
    return torch.zeros(()) if layer.bias is None else layer.bias.detach()


def operation_of(layer: Any) -> Operation:
    """The convolution or linear operation of a supported layer."""
    dimensions = SUPPORTED[kind_of(layer)]
    if not dimensions:
        return Operation()
    padding = layer.padding
    sides: Padding
    if layer.transposed:
        return Operation(
            dimensions,
            tuple(layer.stride),
            tuple((side, side) for side in padding),
            layer.padding_mode,
            tuple(layer.dilation),
            layer.groups,
            True,
            tuple(layer.output_padding),
        )
    if is_same_padded(layer) or padding == "same":
        sides = "same"
    elif padding == "valid":
        sides = ((0, 0),) * dimensions
    else:
        sides = tuple((side, side) for side in padding)
    return Operation(
        dimensions,
        tuple(layer.stride),
        sides,
        layer.padding_mode,
        tuple(layer.dilation),
        layer.groups,
    )


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """The type of `SUPPORTED` that a layer is, else its own.

    Subclasses count, an adapter's and a user's, where they run as the type does.
    """
    own: type[nn.Module] = getattr(type(layer), "cora_base", type(layer))
    for base in SUPPORTED:
        if issubclass(own, base) and all(
            getattr(own, name) is getattr(base, name) for name in _RUNS
        ):
            found: type[nn.Module] = base
            return found
    return own


_RUNS = ("forward", "forward_impl", INNER_FORWARD)
"""The methods by which a layer runs."""


def obstacle(layer: Any) -> str | None:
    """Why a quantized layer cannot carry an adapter, or None."""
    if kind_of(layer) not in SUPPORTED:
        return f"{type(layer).__name__} is not supported"
    if not layer.weight_quant.is_quant_enabled:
        return "its weight is not quantized"
    if lacks_input(layer):
        return (
            "its weight quantizer goes by the layer's input, which is not known; use "
            "apply_cora, which has it from the loader"
        )
    return None


@torch.no_grad()
def read_layers(
    model: nn.Module, reference: Reference | None
) -> tuple[dict[str, QuantizedLayer], dict[str, str], dict[str, QuantTensor]]:
    """Read every quantized layer of a model in evaluation mode.

    Returns:
        The layers that can carry an adapter, the reason for each that cannot, and the
        quantized weight of all of them as Brevitas gives it.

    Raises:
        ModelError: A layer's float weight cannot be had.
    """
    given = _reference_weights(reference)
    layers: dict[str, QuantizedLayer] = {}
    skipped: dict[str, str] = {}
    quantized: dict[str, QuantTensor] = {}
    for name, layer in model.named_modules():
        if inside_adapter(model, name):
            continue
        if not isinstance(layer, QuantWeightBiasInputOutputLayer):
            if isinstance(layer, PLAIN):
                skipped[name] = LEFT_FLOAT
            continue
        if layer.weight_quant.is_quant_enabled and not lacks_input(layer):
            quantized[name] = layer.quant_weight()
        reason = obstacle(layer)
        if reason is not None:
            skipped[name] = reason
            continue
        weight = quantized[name]
        if (
            not isinstance(weight, QuantTensor)
            or weight.value.shape != layer.weight.shape
        ):
            skipped[name] = f"its weight is quantized to a {type(weight).__name__}"
            continue
        operation = operation_of(layer)
        layers[name] = QuantizedLayer(
            name,
            operation.layout(_float_weight(name, layer, weight.value, given)),
            operation.layout(weight.value.detach()),
            operation,
            bits_of(weight),
            _scale_bits(weight),
        )
    return layers, skipped, quantized


@torch.no_grad()
def find_scales(model: nn.Module) -> None:
    """Have every weight's scale searched, as the first run of its layer does.

    A copy that is made before, as of layers that no run reaches, searches without end
    in Brevitas 0.13.4: it calls the quantizer that asked for the scale.
    """
    for layer in model.modules():
        if isinstance(layer, QuantWeightBiasInputOutputLayer):
            if layer.weight_quant.is_quant_enabled and not lacks_input(layer):
                layer.quant_weight()


def inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module is a part of an adapter."""
    parent, _, child = name.rpartition(".")
    while parent:
        if child == "cora":
            return True
        parent, _, child = parent.rpartition(".")
    return False


@torch.no_grad()
def quantized_weight(layer: Any) -> tuple[Tensor, float]:
    """A layer's dequantized weight [m, n/g, *kernel], and its bit width."""
    weight = layer.quant_weight()
    return operation_of(layer).layout(weight.value), bits_of(weight)


def bits_of(weight: QuantTensor) -> float:
    """The bit width of a quantized weight, that of a minifloat with its sign."""
    if hasattr(weight, "exponent_bit_width"):
        return 1 + float(weight.exponent_bit_width) + float(weight.mantissa_bit_width)
    return float(weight.bit_width)


def _scale_bits(weight: QuantTensor) -> int:
    scales: int = FLOAT_BITS * weight.scale.numel()
    zero_point = getattr(weight, "zero_point", None)  # none for minifloats
    if zero_point is not None and torch.count_nonzero(zero_point):
        scales += round(bits_of(weight)) * zero_point.numel()
    return scales


def _reference_weights(reference: Reference | None) -> Mapping[str, Tensor] | None:
    if isinstance(reference, nn.Module):
        return {
            name: module.weight.detach()
            for name, module in reference.named_modules()
            if isinstance(getattr(module, "weight", None), Tensor)
        }
    return reference


def _float_weight(
    name: str, layer: Any, dequantized: Tensor, given: Mapping[str, Tensor] | None
) -> Tensor:
    """The weight that the host quantized: given, kept by GPTQ, or still in place."""
    if given is not None:
        weight = given_weight(
            name,
            given.get(name),
            dequantized,
            "BN merging and equalization move weights, so pass the model as it was "
            "quantized, or snapshot(model) taken right after quantize_model",
        )
        bias = given.get(f"{name}.bias")
        if bias is not None and not torch.equal(bias.to(_bias(layer)), _bias(layer)):
            raise bias_corrected(name)
        return weight
    kept = kept_weight(layer)
    held: Tensor = layer.weight if kept is None else kept
    weight = held.detach().to(dequantized)
    # Not equality: GPTQ divides by the scale and multiplies again, which rounds. Even
    # at 16 bits a residual is ten times this size.
    residual, size = (weight - dequantized).norm(), weight.norm()
    if 0 < size < math.inf and residual <= 1e-6 * size:
        how = computed(layer)
        if how is not None:  # Brevitas takes the parametrization along, not its state.
            raise ModelError(f"{name}: {how.reason(name, 'quantize_model')}")
        raise ModelError(
            f"{name}: its float weight is gone, the layer holds its quantized weight; "
            "pass reference=snapshot(model) taken right after quantize_model, or run "
            "GPTQ and the like with create_weight_orig=True"
        )
    return weight
