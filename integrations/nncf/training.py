"""Trains a model that NNCF quantized: its latent weights, and what parameters are."""

from contextlib import ExitStack
from typing import Any

import torch
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.operation import PLAIN
from cora_plugin.host import Latent, Role
from cora_plugin.integrations.nncf.fast import range_of
from cora_plugin.integrations.nncf.insert import adapted, read_adapters, shifts
from cora_plugin.integrations.nncf.layers import layer_names, quantizer_hooks
from cora_plugin.integrations.scopes import evaluation
from cora_plugin.integrations.training import (
    Training,
    latent,
    refuse_without_latents,
)
from cora_plugin.layer import Correction
from cora_plugin.outputs import run

_OPERATIONS = ("conv", "linear", "embedding", "addmm", "matmul", "bmm", "baddbmm")
"""How functions begin that take a weight, so that a quantizer there may be of one."""


def training(model: nn.Module, example: Any, scales: bool) -> Training:
    """Have the latent weights want gradients: see `TrainableHost.training`."""
    weights = _weights(model, example)
    found, obstacles = [], {}
    for name, (quantizer, weight) in weights.items():
        if not quantizer.is_enabled_quantization():
            obstacles[name] = "its quantizer is switched off"
            continue
        found.append(_latent(name, quantizer, weight))
    refuse_without_latents(found, obstacles)
    # Trained scales are left as the user has them.
    held = [] if scales else [quantizer for quantizer, _ in weights.values()]
    return Training(found, (p for quantizer in held for p in _scales(quantizer)))


def roles(model: nn.Module, example: Any) -> dict[str, Role]:
    """What the parameters of a model are, by name."""
    found: dict[nn.Parameter, Role] = {}
    for module in model.modules():
        if isinstance(module, BaseQuantizer):
            found.update(dict.fromkeys(_scales(module), "activation_scales"))
    for quantizer, weight in _weights(model, example).values():
        found.update(dict.fromkeys(_scales(quantizer), "weight_scales"))
        if quantizer.is_enabled_quantization():
            found[weight] = "latents"
    for branch in adapted(model).values():
        for module in branch.quantizers.values():
            found = {p: r for p, r in found.items() if p not in {*module.parameters()}}
        found.update(dict.fromkeys(branch.parameters(recurse=False), "adapters"))
    names = model.named_parameters()
    return {name: found[value] for name, value in names if value in found}


def trained_correction(model: nn.Module) -> Correction:
    """The correction that a model carries, with the values that it has now."""
    moved = {
        name: hook.shift.detach().flatten() for name, hook in shifts(model).items()
    }
    return Correction(read_adapters(model), moved)


def _scales(quantizer: Any) -> list[nn.Parameter]:
    """Its ranges; the bit width and the like are parameters of integers."""
    return [p for p in quantizer.parameters() if p.is_floating_point()]


def _latent(name: str, quantizer: Any, weight: nn.Parameter) -> Latent:
    levels = quantizer.levels

    def positions() -> Tensor:
        low, span = range_of(quantizer)
        steps = (levels - 1) / span
        zero_point = (-low * steps).round_()
        clipped = torch.minimum(torch.maximum(weight, low), low + span)
        return (clipped - low).mul_(steps).sub_(zero_point)

    # Signed codes of a symmetric range; of another range they may begin anywhere.
    lowest = getattr(quantizer, "level_low", 0)
    if not -128 <= lowest < 0:
        return _from_zero(name, weight, positions, levels)
    return latent(name, weight, positions, lowest, lowest + levels - 1)


def _from_zero(name: str, weight: nn.Parameter, positions: Any, levels: int) -> Latent:
    return latent(name, weight, positions, -(levels // 2), levels - levels // 2 - 1)


def _weights(model: nn.Module, example: Any) -> dict[str, tuple[Any, nn.Parameter]]:
    """Each quantizer of a stored weight, and the weight, by layer name.

    Raises:
        ModelError: A weight cannot be found without an input to run the model with.
    """
    hooks = {
        node: quantizer
        for (node, port), quantizer in quantizer_hooks(model).items()
        if port == 1 and _function(node).startswith(_OPERATIONS)
    }
    names = layer_names(model, list(hooks))
    modules = dict(model.named_modules())
    found: dict[str, tuple[Any, nn.Parameter]] = {}
    unknown = {}
    for node, quantizer in hooks.items():
        module = modules.get(_path(node))
        if isinstance(module, PLAIN):
            found[names[node]] = (quantizer, module.get_parameter("weight"))
        else:
            unknown[names[node]] = quantizer
    if unknown and example is None:
        raise ModelError(
            f"{next(iter(unknown))}: its weight is no plain layer's; to find it NNCF's "
            "model has to be run, so pass NNCFHost(model, example_input, carrying=True)"
        )
    if unknown:
        found |= _seen(model, example, unknown)
    return found


def _path(node: str) -> str:
    return node.rsplit("/", 2)[0].replace("/", ".")


def _function(node: str) -> str:
    return node.rsplit("/", 2)[1]


@torch.no_grad()
def _seen(
    model: nn.Module, example: Any, quantizers: dict[str, Any]
) -> dict[str, tuple[Any, nn.Parameter]]:
    """The parameters that quantizers take as the model runs; others take none."""
    stored = {p.data_ptr(): p for p in model.parameters()}
    found = {}
    with ExitStack() as stack:
        for name, quantizer in quantizers.items():

            def note(
                _: Any, inputs: Any, name: str = name, quantizer: Any = quantizer
            ) -> None:
                parameter = stored.get(inputs[0].data_ptr())
                if parameter is not None and parameter.shape == inputs[0].shape:
                    found[name] = (quantizer, parameter)

            handle = quantizer.register_forward_pre_hook(note)
            stack.callback(handle.remove)
        with evaluation(model):
            run(model, example)
    return found
