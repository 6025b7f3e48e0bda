"""The contract between the algorithm and a toolkit."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.outputs import Batch, Outputs

Observer = Callable[[str, Tensor, Tensor], None]
"""Called as `observer(layer name, quantized input, output)` whenever a layer runs.

Without gradients it may change the output in place: the network goes on with it.
"""

LEFT_FLOAT = "the toolkit left its weight in float"
"""Why a layer that is not quantized is among the skipped ones."""


class Host(Protocol):
    """A quantized model inside its toolkit; the algorithm knows no more than this.

    `cora_plugin.testing.HostContract` tests one.
    """

    @property
    def layers(self) -> Sequence[QuantizedLayer]:
        """The layers that can carry an adapter, in execution or module order."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Layers that cannot carry an adapter, with the reason; those in float, too."""

    def prepared(self) -> AbstractContextManager[None]:
        """Within it the model is in evaluation mode and ready to be run often.

        No parameter wants a gradient, and each weight is quantized only once.
        """

    def run(self, batch: Batch) -> Outputs:
        """The model's outputs in its present state, plain tensors [N, …] by name."""

    def acting(
        self,
        weights: Mapping[str, Tensor] | None = None,
        shifts: Mapping[str, Tensor] | None = None,
        quantized: bool = True,
    ) -> AbstractContextManager[None]:
        """Within it the model runs with other weights, for trials and as a reference.

        No correction is active and biases are float. Gradients reach the given
        tensors: they pass straight through activation quantizers where nothing is
        clipped. Run the backward pass within the block.

        Args:
            weights: Weights by layer name, in place of the layers' own.
            shifts: Constants [m] by layer name that are added to outputs.
            quantized: Whether activations, and the weights that are not given, are
                quantized; where they are not, `acting(quantized=False)` is the float
                model.
        """

    def observe(self, observer: Observer) -> AbstractContextManager[None]:
        """Within it every run of a layer is reported to the observer."""

    def quantize(
        self, weights: Mapping[str, Tensor], bits: Mapping[str, int] | None = None
    ) -> Mapping[str, Tensor]:
        """What the host's own weight quantizers make of float weights, by layer name.

        Args:
            weights: Float weights by layer name, in place of those it has.
            bits: Bit widths by layer name, in place of those it quantizes at.

        Raises:
            ModelError: The main weights of this model must not change, or the host
                cannot quantize at one of the widths.
        """

    def correct(self, correction: Correction) -> None:
        """Replace the model's correction by another.

        `Correction()` removes all that was put in: the model is then bit for bit what
        it was. If anything fails, the correction before stays.

        Raises:
            ModelError: The correction does not fit the model.
        """


@runtime_checkable
class MovesBiases(Protocol):
    """A host whose toolkit has corrected biases, and that knows the float ones.

    `Correction.float_biases` then restores the float ones.
    """

    @property
    def biases_moved(self) -> bool:
        """Whether the toolkit has corrected any bias."""


Role = Literal["latents", "weight_scales", "activation_scales", "adapters"]
"""What a parameter of a quantized model is; one without a role is like any other."""


@dataclass(frozen=True)
class Latent:
    """A float weight that is quantized in every forward pass.

    Attributes:
        name: Its layer, or the first of those that share it.
        weight: The parameter.
        levels: Integer codes now, a tensor of integers in the weight's shape. A
            constant may be added to them: they are only compared.
        positions: The weight in units of its steps, unrounded and within the range of
            levels, so that halves are where codes change; None if not known.
    """

    name: str
    weight: nn.Parameter
    levels: Callable[[], Tensor]
    positions: Callable[[], Tensor] | None = None


@runtime_checkable
class TrainableHost(Protocol):
    """A host whose model can be trained; it may carry a correction already."""

    @property
    def model(self) -> nn.Module:
        """The quantized model."""

    @property
    def correction(self) -> Correction:
        """What stands beside its layers."""

    @property
    def roles(self) -> Mapping[str, Role]:
        """Roles by name of the model's parameters; shared ones are named once."""

    def run(self, batch: Batch) -> Outputs:
        """As `Host.run`; with gradients."""

    def correct(self, correction: Correction) -> None:
        """As `Host.correct`."""

    def training(
        self, scales: bool = False
    ) -> AbstractContextManager[Sequence[Latent]]:
        """Within it latent weights want gradients, and scales of weights stand still.

        A scale that the toolkit computes from the weight at every pass becomes a value
        of its own, for good: a moving scale would move codes by itself.

        Args:
            scales: Whether scales of weights are left as they are, to be trained.

        Raises:
            ModelError: No weight of the model can be trained.
        """

    def renew(self, correction: Correction | None = None) -> None:
        """After training: store adapters for the weights as they are now.

        They get new fingerprints. Whatever was read of the model before is read anew.

        Args:
            correction: What is to stand; None: what stands, with the values that
                adapters were trained to, rounded.
        """

    def fresh(self) -> Host:
        """A host of the same model, whose float weights are the latent ones now.

        The model must carry no correction.
        """

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """The settings that its adapters were made with, if they are known."""

    def note(self, settings: Mapping[str, Any] | None) -> None:
        """Store the settings that its adapters were made with."""
