"""Refuses steps of a recipe in the wrong order, where that can be told.

Quantize, calibrate, GPTQ or the like, CoRa, bias correction. An adapter is made for one
quantized weight: what moves the weight later leaves the adapter behind. Bias correction
takes away the mean of what adapters would take away, which then is taken away twice.
"""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from brevitas.core.function_wrapper.learned_round import LearnedRoundSte
from brevitas.graph.gpxq import GPxQ, gpxq_mode
from brevitas.inject.enum import FloatToIntImplType
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import nn

from cora_plugin.adapters.errors import CoRaError

_ORDER = (
    "the right order is: quantize, calibrate, (GPTQ, GPFQ, Qronos, learned round), "
    "apply_cora, bias correction"
)


def refuse_bias_corrected(model: nn.Module) -> None:
    """Raise if `bias_correction_mode` has run over a model.

    It switches a layer's output quantizer off for its forward passes, and on again only
    where there is one. A saved and reloaded state keeps no such trace.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantWeightBiasInputOutputLayer):
            continue
        if layer.output_quant.disable_quant and not layer.input_quant.disable_quant:
            raise bias_corrected(name)


def bias_corrected(name: str) -> CoRaError:
    """The error for a layer whose bias has been corrected."""
    return CoRaError(
        f"{name}: its bias was corrected before there were adapters, for errors that "
        f"they are about to take away; quantize the model anew: {_ORDER}"
    )


def refuse_gpxq(hook: Callable[..., Any]) -> None:
    """Raise if a hook is that of GPTQ, GPFQ, Qronos or MagR, and undo their entry."""
    optimizer = getattr(getattr(hook, "func", None), "__self__", None)
    if not isinstance(optimizer, GPxQ):
        return
    # Brevitas does not leave a mode that fails while it is entered, and the mode is
    # known to nobody but the function that is entering it.
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), gpxq_mode):
        frame = frame.f_back
    if frame is not None:
        _leave(frame.f_locals["self"], optimizer)
    raise moves_the_weight(optimizer.name, type(optimizer).__name__)


def _leave(mode: Any, entering: Any) -> None:
    for handle in mode.hook_dict.values():
        handle.remove()
    for optimizer in (*mode.gpxq_layers.values(), entering):
        layer = optimizer.layer
        kept = getattr(layer, "weight_orig", None)
        if kept is not None and torch.equal(kept.to(layer.weight), layer.weight):
            del layer.weight_orig
    mode.__exit__(None, None, None)
    # What it puts back is the class's own method, but on the model.
    own, forward = vars(mode.model), mode.orig_forward
    if getattr(forward, "__func__", None) is type(mode.model).forward:
        own.pop("forward", None)


def watch_rounding(name: str, layer: Any) -> None:
    """Have learned round refused where it would begin on a layer with an adapter."""
    proxy = layer.weight_quant
    proxy.cora_watched = name, proxy.quant_injector
    # A bound method, since deepcopy binds it to the copied proxy.
    proxy.init_tensor_quant = MethodType(_init_tensor_quant, proxy)


def unwatch_rounding(layer: Any) -> None:
    """Undo `watch_rounding`."""
    for field in ("cora_watched", "init_tensor_quant"):
        vars(layer.weight_quant).pop(field, None)


def _init_tensor_quant(proxy: Any, *args: Any, **kwargs: Any) -> None:
    rounding = getattr(proxy.quant_injector, "float_to_int_impl_type", None)
    begun = any(isinstance(m, LearnedRoundSte) for m in proxy.modules())
    if rounding == FloatToIntImplType.LEARNED_ROUND and not begun:
        name, proxy.quant_injector = proxy.cora_watched
        raise moves_the_weight(name, "learned round")
    type(proxy).init_tensor_quant(proxy, *args, **kwargs)


def moves_the_weight(name: str, method: str) -> CoRaError:
    """The error for a method that was begun on a layer with an adapter."""
    return CoRaError(
        f"{name}: carries an adapter, made for its weight as it is, which {method} "
        f"would change; call remove_cora(model) first: {_ORDER}"
    )
