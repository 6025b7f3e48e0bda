"""Notes with adapters what they were made for, and refuses them elsewhere."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from cora_plugin.adapters import Adapter, Operation
from cora_plugin.adapters.errors import CoRaError
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
    """A correction whose adapters know the layers that they were made for.

    Where the main weight is replaced, too, an adapter alone fits nothing.
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
    """Compare adapters with the weights that they would stand beside.

    Layers that are not there, or have weights of another shape, are not judged.

    Raises:
        CoRaError: An adapter was made for another weight.
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
            raise CoRaError(
                f"{name}: the adapter was made for {difference}; quantize the same "
                "float model by the same recipe, or load the state of the quantized "
                "model that it was made for"
            )
