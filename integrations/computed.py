"""Weights that a layer computes as it runs: by what, and how to have them stored."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import (
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

WEIGHT = "weight"

# The hooks that torch's older functions leave at a layer, and what takes them out.
_HOOKS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "WeightNorm": (weight_norm.__name__, remove_weight_norm),
    "SpectralNorm": (spectral_norm.__name__, remove_spectral_norm),
}


@dataclass(frozen=True)
class Computed:
    """How a layer's weight comes about, what stores it, and the call to write."""

    by: str
    store: Callable[[nn.Module], Any]
    call: str

    def reason(self, path: str, before: str) -> str:
        """Why the layer is left alone, and the way out.

        Args:
            path: The layer's name in its model.
            before: What is to come after the way out.
        """
        return (
            f"its weight is computed by {self.by} as the model runs, not stored; take "
            f"that out before {before}: {self.call.format(path)}"
        )


def computed(layer: nn.Module) -> Computed | None:
    """How a layer's weight is computed; None: it is stored."""
    if parametrize.is_parametrized(layer, WEIGHT):
        chain: Any = layer.parametrizations
        names = ", ".join(type(each).__name__.strip("_") for each in chain[WEIGHT])
        return Computed(
            f"the parametrization {names}",
            lambda layer: parametrize.remove_parametrizations(layer, WEIGHT),
            "torch.nn.utils.parametrize.remove_parametrizations(model.{}, 'weight')",
        )
    for hook in layer._forward_pre_hooks.values():
        if getattr(hook, "name", getattr(hook, "_tensor_name", None)) != WEIGHT:
            continue
        if isinstance(hook, prune.BasePruningMethod):
            return Computed(
                "torch.nn.utils.prune",
                lambda layer: prune.remove(layer, WEIGHT),
                "torch.nn.utils.prune.remove(model.{}, 'weight')",
            )
        if type(hook).__name__ in _HOOKS:
            name, remove = _HOOKS[type(hook).__name__]
            call = f"torch.nn.utils.{remove.__name__}(model.{{}})"
            return Computed(f"torch.nn.utils.{name}", remove, call)
    return None


def computed_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, Computed]]:
    """The layers of a model whose weight is computed, by name."""
    for name, layer in model.named_modules():
        how = computed(layer)
        if how is not None:
            yield name, layer, how


def computed_hints(model: nn.Module, before: str) -> Iterator[str]:
    """The first layer whose weight is computed, if any, and the way out."""
    for name, _, how in computed_weights(model):
        yield f"{name}: {how.reason(name, before)}"
        return


def stored_weights(model: nn.Module) -> nn.Module:
    """The model, or where it computes weights, a copy in evaluation mode with them."""
    if not any(True for _ in computed_weights(model)):
        return model
    make_copyable(model)
    copied = copy.deepcopy(model).eval()
    for _, layer, how in list(computed_weights(copied)):
        if parametrize.is_parametrized(layer):
            layer.__class__ = _own_class(layer)
        how.store(layer)
        weight: Any = layer.weight
        if not isinstance(weight, nn.Parameter):  # so left where nothing was trained
            delattr(layer, WEIGHT)
            layer.register_parameter(WEIGHT, nn.Parameter(weight.detach()))
    return copied


def _own_class(layer: nn.Module) -> type[nn.Module]:
    """A copy of a parametrized layer's class, which torch changes, and copies share."""
    cls = type(layer)
    kept = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, cls.__bases__, kept)


def make_copyable(model: nn.Module) -> None:
    """Let go of the gradients of weights that hooks computed: no copy can have them."""
    for _, layer, _ in computed_weights(model):
        if not parametrize.is_parametrized(layer, WEIGHT):
            vars(layer)[WEIGHT] = vars(layer)[WEIGHT].detach()
