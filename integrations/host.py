"""What hosts of torch models share: checks, and how a correction is replaced."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.integrations.provenance import with_fingerprints
from cora_plugin.layer import Correction


def replace_correction(
    standing: Correction,
    correction: Correction,
    made_for: Mapping[str, Fingerprint],
    insert: Callable[[Correction], None],
    remove: Callable[[], None],
) -> Correction:
    """Replace a model's correction; if that fails, the one before stays.

    Args:
        standing: What the model carries.
        correction: What it is to carry instead.
        made_for: Fingerprints of the model's layers, which the adapters note.
        insert: Puts a correction into the model; may fail halfway.
        remove: Takes out what the model carries, or the half that was put in.

    Returns:
        What the model carries now.
    """
    noted = with_fingerprints(correction, made_for)
    # New layers are initialized at random, which the caller's numbers must not show.
    with torch.random.fork_rng(devices=[]):
        remove()
        try:
            insert(noted)
        except BaseException:
            remove()
            insert(standing)
            raise
    return noted


def refuse_carriers(layers: Iterable[str]) -> None:
    """Refuse to give adapters to layers that carry one already.

    Raises:
        ModelError: There is such a layer.
    """
    for name in layers:
        raise ModelError(
            f"{name}: already carries an adapter; call remove_cora(model) first"
        )


def refuse_without_adapters(adapters: Mapping[str, Adapter]) -> None:
    """Refuse to save the adapters of a model that carries none.

    Raises:
        ModelError: There are none.
    """
    if not adapters:
        raise ModelError(
            "the model carries no adapters to save; call apply_cora, whose report says "
            "where it kept none"
        )


def check_fit(
    name: str,
    weight: Tensor | None,
    groups: int,
    adapter: Adapter | None = None,
    shift: Tensor | None = None,
) -> None:
    """Refuse an adapter or a shift that does not fit its layer.

    Args:
        name: The layer.
        weight: The layer's weight; None: the model has no such layer.
        groups: The layer's groups.
        adapter: The adapter for the layer; None: none, so that any layer will do.
        shift: The constant [m] for its outputs; None: none.

    Raises:
        ModelError: There is no such layer, or it has another shape or other groups.
    """
    if weight is None:
        raise ModelError(
            f"{name}: the model has no quantized layer of this name that can carry "
            "an adapter; quantize it by the recipe the adapters were made for"
        )
    shape = tuple(weight.shape)
    if shift is not None and shift.shape != shape[:1]:
        raise ModelError(
            f"{name}: the bias correction has shape {list(shift.shape)}, the layer "
            f"{shape[0]} outputs"
        )
    if adapter is None:
        return
    if shape != adapter.weight_shape:
        raise ModelError(
            f"{name}: the adapter is for a weight of shape "
            f"{list(adapter.weight_shape)}, the layer's is {list(shape)}"
        )
    if groups != adapter.groups:
        raise ModelError(
            f"{name}: the adapter is for {adapter.groups} groups, the layer has "
            f"{groups}"
        )


def given_weight(
    name: str, weight: Tensor | None, dequantized: Tensor, way_out: str
) -> Tensor:
    """A layer's float weight from a reference, checked against the quantized one.

    Args:
        name: The layer.
        weight: What the reference has; None: nothing.
        dequantized: The layer's quantized weight.
        way_out: Which reference to pass instead, for the error.

    Raises:
        ModelError: There is none, or it is not what was quantized.
    """
    if weight is None or weight.shape != dequantized.shape:
        found = "no weight" if weight is None else f"shape {list(weight.shape)}"
        raise ModelError(
            f"{name}: the reference has {found} where the quantized layer has shape "
            f"{list(dequantized.shape)}; {way_out}"
        )
    weight = weight.to(dequantized)
    if not dequantized.any():
        return weight  # Zeros, which a norm that begins at 0 makes, have no direction.
    # Not their distance alone: Qronos moves small layers by more than their size.
    alike = torch.cosine_similarity(weight.flatten(), dequantized.flatten(), 0)
    if alike < 0.3 or (weight - dequantized).norm() > 1.3 * weight.norm():
        raise ModelError(
            f"{name}: the reference's weight has nothing to do with the quantized "
            f"one; {way_out}"
        )
    return weight
