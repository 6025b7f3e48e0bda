"""One quantized layer, and the corrections that are put beside layers."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from cora_plugin.adapters import Adapter, Operation
from cora_plugin.adapters.errors import ConfigError
from cora_plugin.adapters.exact import exact
from cora_plugin.adapters.form import full_rank, is_depthwise, residual_matrices

T = TypeVar("T")


def by_layer(
    setting: str, values: Mapping[str, T], layers: Sequence[str]
) -> dict[str, T]:
    """Look up values that are given by layer name or glob; the last that fits wins.

    A key that is a layer's name is that layer's alone, whatever characters are in it;
    brackets that match nothing as a set of characters are those of names.

    Args:
        setting: The name of the setting, for messages.
        values: By name or glob.
        layers: The names of the model's layers.

    Raises:
        ConfigError: A name or glob fits no layer.
    """
    chosen: dict[str, T] = {}
    for pattern, value in values.items():
        fitting = _fitting(pattern, layers)
        if not fitting:
            problem = f"{pattern!r} fits no layer; they are {', '.join(layers)}"
            raise ConfigError((setting,), problem)
        chosen |= dict.fromkeys(fitting, value)
    return chosen


def _fitting(pattern: str, layers: Sequence[str]) -> list[str]:
    """The layers that a name or a glob means."""
    if pattern in layers:
        return [pattern]
    for glob in (pattern, pattern.replace("[", "[[]")):
        fitting = [name for name in layers if fnmatch.fnmatchcase(name, glob)]
        if fitting:
            return fitting
    return []


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
        return exact(self.weight) - exact(self.dequantized)

    @property
    def matrices(self) -> Tensor:
        """The residual as the matrices that are factored, [g, m/g, k]."""
        return self.as_matrices(self.residual)

    def as_matrices(self, weight: Tensor) -> Tensor:
        """Any weight of this shape as those matrices; depthwise: one, [1, m, k]."""
        return residual_matrices(weight, self.operation.groups)

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
        return full_rank(tuple(self.weight.shape), self.operation.groups)

    @property
    def depthwise(self) -> bool:
        """Whether each group sees one input channel."""
        return is_depthwise(tuple(self.weight.shape), self.operation.groups)

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
      own, and `dequantized`, what `Host.quantize` made of them.

    With `float_biases` the biases are those of the float model, where the host has
    moved them.
    """

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    dequantized: Mapping[str, Tensor] = field(default_factory=dict)
    float_biases: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All that it stores."""
        stored = [t for each in self.adapters.values() for t in each.tensors.values()]
        scales = [tensor.scale for tensor in stored if tensor.scale is not None]
        others = (self.shifts, self.weights, self.dequantized)
        return [
            *(tensor.values for tensor in stored),
            *scales,
            *(tensor for each in others for tensor in each.values()),
        ]

    def scaled(self, share: float) -> "Correction":
        """The same with each adapter and shift multiplied by `share`."""
        return replace(
            self,
            adapters={name: each.scaled(share) for name, each in self.adapters.items()},
            shifts={name: share * each for name, each in self.shifts.items()},
        )
