"""What a host hands over: one quantized layer, and the contract of a host."""

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from torch import Tensor

from cora_plugin.adapters import Adapter, Operation
from cora_plugin.adapters.adapter import full_rank, is_depthwise, residual_matrices
from cora_plugin.adapters.errors import CoRaError

T = TypeVar("T")


def by_layer(
    setting: str, values: Mapping[str, T], layers: Sequence[str]
) -> dict[str, T]:
    """Values that are given by layer name or glob; the last that fits wins.

    Args:
        setting: What they are, for messages.
        values: By name or glob.
        layers: The names of the model's layers.

    Raises:
        CoRaError: A name or glob fits no layer.
    """
    chosen: dict[str, T] = {}
    for pattern, value in values.items():
        fitting = [name for name in layers if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise CoRaError(
                f"{setting}: {pattern!r} fits no layer; they are {', '.join(layers)}"
            )
        chosen |= dict.fromkeys(fitting, value)
    return chosen


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer as the host quantized it; weights are [m, n/g, *kernel] or [m, n].

    `weight_bits` is the bit width of the stored weight and `scale_bits` the bits of its
    scales and zero points together.
    """

    name: str
    weight: Tensor
    dequantized: Tensor
    operation: Operation
    weight_bits: float
    scale_bits: int

    @property
    def residual(self) -> Tensor:
        """`E = W − Wq`, in float64."""
        return self.weight.double() - self.dequantized.double()

    @property
    def matrices(self) -> Tensor:
        """The residual as the matrices that are factored, [g, m/g, k]."""
        return self.as_matrices(self.residual)

    def as_matrices(self, weight: Tensor) -> Tensor:
        """Any weight of this shape as those matrices; depthwise: one, [1, m, k]."""
        return residual_matrices(weight, self.operation)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size, empty for a linear layer."""
        return tuple(self.weight.shape[2:])

    @property
    def columns(self) -> int:
        """k, the length of one unfolded input column of a group."""
        return math.prod(self.weight.shape[1:])

    @property
    def full_rank(self) -> int:
        """Largest useful rank a group."""
        return full_rank(tuple(self.weight.shape), self.operation)

    @property
    def depthwise(self) -> bool:
        """Whether each group sees one input channel."""
        return is_depthwise(tuple(self.weight.shape), self.operation)

    @property
    def stored_bits(self) -> float:
        """Bits of the quantized weight with its scales and zero points."""
        return self.weight_bits * self.weight.numel() + self.scale_bits


@dataclass(frozen=True)
class Correction:
    """What is put beside the layers of a model, each by layer name.

    * `adapters`;
    * `shifts`: constants [m] that are added to outputs, a bias correction;
    * `weights`: float weights whose quantization by the host takes the place of its
      own, see `Host.requantize`.

    With `float_biases` the biases are those of the float model, where the host has
    changed them.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    float_biases: bool = False

    def scaled(self, share: float) -> "Correction":
        """A share of each adapter and shift."""
        return replace(
            self,
            adapters={name: each.scaled(share) for name, each in self.adapters.items()},
            shifts={name: share * each for name, each in self.shifts.items()},
        )


Observer = Callable[[str, Tensor, Tensor], None]
"""Called as `observer(layer name, quantized input, output)` whenever a layer runs.

Without gradients it may change the output in place: the network goes on with it.
"""


class Host(Protocol):
    """A quantized model inside its toolkit; the algorithm knows no more than this."""

    @property
    def layers(self) -> Sequence[QuantizedLayer]:
        """The layers that can carry an adapter, in execution or module order."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Quantized layers that cannot, and why."""

    @property
    def biases_changed(self) -> bool:
        """Whether the host has moved biases away from the float model's."""

    def prepared(self) -> AbstractContextManager[None]:
        """Within it the model is in evaluation mode and ready to be run often."""

    def run(self, images: Tensor) -> Tensor:
        """The model's output in its present state, a plain tensor [N, classes, …]."""

    def float_model(self) -> AbstractContextManager[None]:
        """Within it `run` gives the float model's output."""

    def weights(
        self,
        values: Mapping[str, Tensor],
        shifts: Mapping[str, Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Within it these layers' weights are these tensors, by layer name.

        Other layers keep their quantized weights, biases are float, and activations
        stay quantized; `shifts` [m] are added to outputs. Gradients reach the tensors:
        through the activation quantizers they pass straight, where nothing is clipped.
        A backward pass belongs within.
        """

    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        """Within it every run of a layer is reported to the observer."""

    def requantize(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the host's own weight quantizers make of other float weights.

        Raises:
            CoRaError: The main weights of this model must stay as they are.
        """

    def insert(self, correction: Correction) -> None:
        """Put a correction into the model; all of it or, on an error, nothing."""

    def remove(self) -> None:
        """Take it out again: the model is as it was."""
