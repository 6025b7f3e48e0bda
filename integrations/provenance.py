"""Records which weight an adapter was made for, and refuses it for any other."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from cora_plugin.adapters import Adapter, Operation
from cora_plugin.adapters.errors import FileError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.layer import Correction, QuantizedLayer

Weight = tuple[Tensor, float, Operation]
"""A dequantized weight, its bit width, and the operation that it is used in."""


def fingerprints(layers: Iterable[QuantizedLayer]) -> dict[str, Fingerprint]:
    """The fingerprints of layers by name."""
    return {
        layer.name: Fingerprint.of(
            layer.dequantized, layer.weight_bits, layer.operation
        )
        for layer in layers
    }


def with_fingerprints(
    correction: Correction, made_for: Mapping[str, Fingerprint]
) -> Correction:
    """The correction with fingerprints of the layers that its adapters were made for.

    An adapter whose main weight is replaced as well gets none: alone it fits no layer.
    """
    adapters = {
        name: replace(adapter, fingerprint=made_for.get(name))
        for name, adapter in correction.adapters.items()
        if name not in correction.weights
    }
    return replace(correction, adapters={**correction.adapters, **adapters})


def check_made_for(
    adapters: Mapping[str, Adapter], weights: Mapping[str, Weight]
) -> None:
    """Check that adapters were made for the weights of their layers.

    Layers that are missing, or have weights of another shape, are not checked.

    Raises:
        FileError: An adapter was made for another weight.
    """
    for name, adapter in adapters.items():
        if name not in weights or adapter.fingerprint is None:
            continue
        weight, bits, operation = weights[name]
        if tuple(weight.shape) != adapter.weight_shape:
            continue
        found = Fingerprint.of(weight, bits, operation)
        difference = adapter.fingerprint.difference(found, weight.numel())
        if difference is not None:
            raise FileError(
                f"{name}: the adapter was made for {difference}; quantize the same "
                "float model by the same recipe, or load the state of the quantized "
                "model that it was made for"
            )
