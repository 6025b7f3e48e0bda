"""The contract between the algorithm and a toolkit."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.outputs import Batch, Outputs

Observer = Callable[[str, Tensor, Tensor], None]
"""Called as `observer(layer name, quantized input, output)` whenever a layer runs.

Without gradients it may change the output in place: the network goes on with it.
"""


class Host(Protocol):
    """A quantized model inside its toolkit; the algorithm knows no more than this.

    `cora_plugin.testing.HostContract` tests one.
    """

    @property
    def layers(self) -> Sequence[QuantizedLayer]:
        """The layers that can carry an adapter, in execution or module order."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Quantized layers that cannot carry an adapter, with the reason."""

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
