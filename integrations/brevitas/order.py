"""Refuses the steps of a recipe in the wrong order, where that can be detected.

The order is: quantize, calibrate, GPTQ or the like, CoRa, bias correction. An adapter
is made for one quantized weight and no longer fits when that moves. Bias correction and
adapters remove the same mean error; running it first subtracts it twice.
"""

from typing import Any

from torch import nn

from cora_plugin.adapters.errors import ModelError
from cora_plugin.integrations.brevitas import private

_ORDER = (
    "the right order is: quantize, calibrate, (GPTQ, GPFQ, Qronos, learned round), "
    "apply_cora, bias correction"
)


def refuse_bias_corrected(model: nn.Module) -> None:
    """Raise if `bias_correction_mode` has run over a model.

    A saved and reloaded state keeps no trace of it.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, private.QuantWeightBiasInputOutputLayer):
            continue
        if private.output_left_off(layer):
            raise bias_corrected(name)


def bias_corrected(name: str) -> ModelError:
    """The error for a layer whose bias has been corrected."""
    return ModelError(
        f"{name}: its bias was corrected before there were adapters, for errors that "
        f"they are about to take away; quantize the model anew: {_ORDER}"
    )


def _refuse_gpxq(model: nn.Module, method: str) -> None:
    """Raise where GPTQ, GPFQ, Qronos or MagR begins on a model with adapters."""
    for name, layer in model.named_modules():
        if hasattr(type(layer), "cora_base"):
            raise moves_the_weight(name, method)


# For good, for adapters come with deepcopy and pickle, too; other models pass.
private.before_gpxq(_refuse_gpxq)


def watch_rounding(name: str, layer: Any) -> None:
    """Refuse learned round from now on where it begins on a layer with an adapter."""
    proxy = layer.weight_quant
    proxy.cora_watched = name, private.injector(proxy)
    private.before_building(proxy, _refuse_learned_round)


def unwatch_rounding(layer: Any) -> None:
    """Undo `watch_rounding`."""
    vars(layer.weight_quant).pop("cora_watched", None)
    private.build_unchecked(layer.weight_quant)


def _refuse_learned_round(proxy: Any) -> None:
    if private.begins_learned_round(proxy):
        name, injector = proxy.cora_watched
        private.set_injector(proxy, injector)
        raise moves_the_weight(name, "learned round")


def moves_the_weight(name: str, method: str) -> ModelError:
    """The error for a method that was begun on a layer with an adapter."""
    return ModelError(
        f"{name}: carries an adapter, made for its weight as it is, which {method} "
        f"would change; call remove_cora(model) first: {_ORDER}"
    )
