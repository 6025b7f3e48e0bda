"""Trains a Brevitas model: its latent weights, and what its parameters are."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import ModelError
from cora_plugin.host import Latent, Role
from cora_plugin.integrations.brevitas.insert import corrected, read_correction
from cora_plugin.integrations.brevitas.layers import inside_adapter, unpack
from cora_plugin.integrations.brevitas.private import (
    ActQuantProxyFromInjectorBase,
    QuantWeightBiasInputOutputLayer,
    holds_scale,
    integer_range,
    integer_steps,
    integer_weight,
    learns_rounding,
    renew_kept_weight,
    with_held_scale,
)
from cora_plugin.integrations.training import (
    Training,
    latent,
    refuse_without_latents,
)
from cora_plugin.layer import Correction


def training(model: nn.Module, scales: bool) -> Training:
    """Have the latent weights want gradients: see `TrainableHost.training`."""
    found, obstacles = [], {}
    for name, layer in _layers(model):
        reason = _obstacle(layer)
        if reason is not None:
            obstacles[name] = reason
            continue
        if not scales:
            _hold_scale(name, layer)
        found.append(_latent(name, layer))
    refuse_without_latents(found, obstacles)
    # Trained scales are left as the user has them.
    held = [] if scales else [layer.weight_quant for _, layer in _layers(model)]
    return Training(found, (p for proxy in held for p in proxy.parameters()))


def roles(model: nn.Module) -> dict[str, Role]:
    """What the parameters of a model are, by name."""
    found: dict[nn.Parameter, Role] = {}
    for _, layer in _layers(model):
        found.update(dict.fromkeys(layer.weight_quant.parameters(), "weight_scales"))
        if _obstacle(layer) is None:
            found[layer.weight] = "latents"
    for name, module in model.named_modules():
        if isinstance(module, ActQuantProxyFromInjectorBase) and not inside_adapter(
            model, name
        ):
            found.update(dict.fromkeys(module.parameters(), "activation_scales"))
    for layer in corrected(model).values():
        if layer.cora is not None:
            found.update(dict.fromkeys(layer.cora.parameters(), "adapters"))
    names = model.named_parameters()
    return {name: found[value] for name, value in names if value in found}


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in model.named_modules():
        if isinstance(layer, QuantWeightBiasInputOutputLayer) and not inside_adapter(
            model, name
        ):
            yield name, layer


def _obstacle(layer: Any) -> str | None:
    """Why a layer's weight cannot be trained, or None."""
    if layer.weight_quant.disable_quant:
        return "its quantizer is switched off"
    if not layer.weight_quant.is_quant_enabled:
        return "its weight is not quantized"
    if not isinstance(layer.weight, nn.Parameter):
        return "its weight is computed (pruned or parametrized), not stored"
    if learns_rounding(layer.weight_quant):
        return "its rounding was learned, so its weight is no longer what is rounded"
    return None


@torch.no_grad()
def _hold_scale(name: str, layer: Any) -> None:
    """Make the scale of a layer a value, if it is computed from the weight.

    Raises:
        ModelError: It cannot be.
    """
    proxy = layer.weight_quant
    if holds_scale(proxy):
        return
    before = unpack(type(layer).quant_weight(layer))
    try:
        other = with_held_scale(proxy, layer).to(layer.weight.device)
        after = unpack(other.train(proxy.training)(layer.weight))
        alike = torch.allclose(before, after, rtol=1e-5)
        why = "" if alike else "its weight would become another"
    except Exception as error:  # Of whatever kind an injector raises.
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    if why:
        raise ModelError(
            f"{name}: its scale is computed from its weight at every pass, and cannot "
            f"be made a value ({why}); use a weight quantizer with "
            'scaling_impl_type="parameter_from_stats"'
        )
    layer.weight_quant = other


def _latent(name: str, layer: Any) -> Latent:
    quantizer = integer_weight(layer.weight_quant)
    weight = layer.weight
    if quantizer is None:
        return Latent(name, weight, partial(_any_levels, layer))
    with torch.no_grad():
        lowest, highest = integer_range(
            quantizer, integer_steps(layer.weight_quant, weight)[2]
        )

    def positions() -> Tensor:
        # As it is by then: Brevitas builds quantizers anew where it loads a state.
        scale, zero_point, _ = integer_steps(layer.weight_quant, weight)
        steps: Tensor = weight / scale
        return steps.add_(zero_point).clamp_(lowest, highest)

    return latent(name, weight, positions, lowest, highest)


@torch.no_grad()
def _any_levels(layer: Any) -> Tensor:
    """Codes of binary and ternary weights, and of other roundings."""
    weight: Any = type(layer).quant_weight(layer)
    codes: Tensor = (weight.value / weight.scale).round_()
    return codes.to(torch.int8 if codes.abs().max() <= 127 else torch.int32)


def settle(model: nn.Module) -> None:
    """Take the weights as they are now for the float ones, also after GPTQ."""
    for _, layer in _layers(model):
        renew_kept_weight(layer)


def trained_correction(model: nn.Module) -> Correction:
    """The correction that a model carries, with the values that adapters have now."""
    adapters = {
        name: Adapter.of(
            layer.cora.adapter.forms,
            {part: each.weight.detach() for part, each in layer.cora.named_children()},
        )
        for name, layer in corrected(model).items()
        if layer.cora is not None
    }
    return replace(read_correction(model), adapters=adapters)
