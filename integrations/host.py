"""What the hosts of torch models check, each in the same words."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import CoRaError


def run_model(
    model: nn.Module, images: Tensor, unpack: Callable[[Any], Any] = lambda y: y
) -> Tensor:
    """A model's logits for images [N, …], on the model's device and in its dtype.

    Args:
        model: The model.
        images: Its input.
        unpack: Makes a tensor of the toolkit's own kind of output.

    Raises:
        CoRaError: The output is not one tensor [N, classes, …].
    """
    first = next(model.parameters())
    output = model(images.to(first.device, first.dtype))
    if isinstance(output, tuple | list) and len(output) == 1:
        output = output[0]
    output = unpack(output)
    if not isinstance(output, Tensor) or output.ndim < 2:
        raise CoRaError(
            f"the model's output is {type(output).__name__}, not logits [N, "
            "classes, …]; wrap the model so that its forward returns one tensor"
        )
    return output


def refuse_carriers(layers: Iterable[str]) -> None:
    """Refuse to give adapters to layers that carry one already.

    Raises:
        CoRaError: There is such a layer.
    """
    for name in layers:
        raise CoRaError(
            f"{name}: already carries an adapter; call remove_cora(model) first"
        )


def refuse_without_adapters(adapters: Mapping[str, Adapter]) -> None:
    """Refuse to save the adapters of a model that carries none.

    Raises:
        CoRaError: There are none.
    """
    if not adapters:
        raise CoRaError(
            "the model carries no adapters to save; call apply_cora, whose report says "
            "where it kept none"
        )


def check_fit(
    name: str, adapter: Adapter | None, weight: Tensor | None, groups: int
) -> None:
    """Refuse an adapter that does not fit its layer.

    Args:
        name: The layer.
        adapter: What is to stand beside it; None: nothing, so that any layer will do.
        weight: The layer's weight; None: the model has no such layer.
        groups: The layer's groups.

    Raises:
        CoRaError: There is no such layer, or it has another shape or other groups.
    """
    if weight is None:
        raise CoRaError(
            f"{name}: the model has no quantized layer of this name that can carry "
            "an adapter; quantize it by the recipe the adapters were made for"
        )
    if adapter is None:
        return
    shape = tuple(weight.shape)
    if shape != adapter.weight_shape:
        raise CoRaError(
            f"{name}: the adapter is for a weight of shape "
            f"{list(adapter.weight_shape)}, the layer's is {list(shape)}"
        )
    if groups != adapter.groups:
        raise CoRaError(
            f"{name}: the adapter is for {adapter.groups} groups, the layer has "
            f"{groups}"
        )


def given_weight(
    name: str, weight: Tensor | None, dequantized: Tensor, way_out: str
) -> Tensor:
    """The float weight that a reference holds for a layer, if it can be that.

    Args:
        name: The layer.
        weight: What the reference has; None: nothing.
        dequantized: The layer's quantized weight.
        way_out: Which reference to pass instead, for the error.

    Raises:
        CoRaError: There is none, or it is not what was quantized.
    """
    if weight is None or weight.shape != dequantized.shape:
        found = "no weight" if weight is None else f"shape {list(weight.shape)}"
        raise CoRaError(
            f"{name}: the reference has {found} where the quantized layer has shape "
            f"{list(dequantized.shape)}; {way_out}"
        )
    weight = weight.to(dequantized)
    # Not their distance alone: Qronos moves small layers by more than their size.
    alike = torch.cosine_similarity(weight.flatten(), dequantized.flatten(), 0)
    if alike < 0.3 or (weight - dequantized).norm() > 1.3 * weight.norm():
        raise CoRaError(
            f"{name}: the reference's weight has nothing to do with the quantized "
            f"one; {way_out}"
        )
    return weight
