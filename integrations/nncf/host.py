"""The host of a model quantized by NNCF."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.host import Observer, Role
from cora_plugin.integrations.host import (
    refuse_carriers,
    replace_correction,
)
from cora_plugin.integrations.nncf.bits import check_bits, set_bits
from cora_plugin.integrations.nncf.fast import fused_quantizers
from cora_plugin.integrations.nncf.insert import (
    OURS,
    adapted,
    hook_input,
    hook_output,
    insert_hooks,
    remove_hooks,
)
from cora_plugin.integrations.nncf.layers import (
    Reading,
    Reference,
    check_model,
    parameters_of,
    read_layers,
)
from cora_plugin.integrations.nncf.swap import parameter_values
from cora_plugin.integrations.nncf.training import (
    roles,
    trained_correction,
    training,
)
from cora_plugin.integrations.provenance import fingerprints
from cora_plugin.integrations.restored import restored
from cora_plugin.integrations.scopes import evaluation, replaced, without_gradients
from cora_plugin.integrations.training import Training
from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.outputs import Batch, Outputs, run, suited

WEIGHT_PORT = 1
"""The weight's place among the arguments of every operation that carries adapters."""

_OWN_WEIGHTS = (
    "alternations: NNCF keeps the float weights in the model and quantizes them as it "
    "runs, so they cannot be replaced by what the adapters leave of them; use "
    "alternations=0, or Brevitas"
)


class NNCFHost:
    """Implements `cora_plugin.host.Host` for a torch model that NNCF quantized.

    Args:
        model: What `nncf.quantize` returned.
        example_input: An input, for NNCF traces the model to find its layers.
        reference: The float model that was quantized. It is needed where NNCF corrected
            biases, which it does not keep, or where training moved the weights.

        carrying: Whether the model may carry adapters already, which then stand.

    Raises:
        ModelError: The model is of another backend, not quantized, or already carries
            adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        reference: Reference | None = None,
        carrying: bool = False,
    ) -> None:
        check_model(model)
        if not carrying:
            refuse_carriers(adapted(model))
        self.model = model
        self._example = suited(model, example_input)
        self._reference = reference
        self._changed_biases: dict[str, Tensor] = {}
        self._standing = trained_correction(model) if carrying else Correction()

    @cached_property
    def _fingerprints(self) -> dict[str, Fingerprint]:
        return fingerprints(self.layers)

    @cached_property
    def reading(self) -> Reading:
        """The model's quantized layers as they were when first asked for.

        Raises:
            ModelError: There is no example to trace the model with.
        """
        if self._example is None:
            raise ModelError(
                "NNCF finds layers by tracing the model, which takes an input; pass "
                "NNCFHost(model, example_input, carrying=True)"
            )
        with evaluation(self.model):
            return read_layers(self.model, self._example, self._reference)

    @cached_property
    def moved(self) -> Mapping[str, Tensor]:
        """The reference's parameters that differ from the model's, by name."""
        if self._reference is None:
            return {}
        given = parameters_of(self._reference)
        own = dict(self.model.named_parameters())
        return {
            name: value.detach().to(own[name])
            for name, value in given.items()
            if name in own
            and value.shape == own[name].shape
            and not torch.equal(value.to(own[name]), own[name])
        }

    @property
    def layers(self) -> Sequence[QuantizedLayer]:
        """The layers that can carry an adapter, in execution order."""
        return list(self.reading.layers.values())

    @property
    def skipped(self) -> Mapping[str, str]:
        """Layers that cannot carry an adapter, with the reason."""
        return self.reading.skipped

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Evaluation mode, no parameter gradients, each weight quantized only once."""
        with ExitStack() as stack:
            stack.enter_context(restored(self.model))
            stack.enter_context(evaluation(self.model))
            stack.enter_context(without_gradients(self.model))
            for quantizer, (_, quantized) in self.reading.weights.items():
                stack.enter_context(
                    replaced(quantizer, "forward", _constant(quantized))
                )
            for activation, quantize in fused_quantizers(self.model):
                if activation not in self.reading.weights:
                    stack.enter_context(replaced(activation, "forward", quantize))
            yield

    def run(self, batch: Batch) -> Outputs:
        """The model's outputs, plain tensors on the model's device."""
        return run(self.model, batch)

    @contextmanager
    def acting(
        self,
        weights: Mapping[str, Tensor] | None = None,
        shifts: Mapping[str, Tensor] | None = None,
        quantized: bool = True,
    ) -> Iterator[None]:
        """Other weights and shifts; the rest quantized or float."""
        with self._without_ours() as stack:
            for quantizer, (own, rounded) in self.reading.weights.items():
                value = rounded if quantized else own
                stack.enter_context(replaced(quantizer, "forward", _constant(value)))
            if not quantized:
                for module in self.model.modules():
                    if isinstance(module, BaseQuantizer) and (
                        module not in self.reading.weights
                    ):
                        stack.enter_context(replaced(module, "forward", _identity))
            for name, weight in (weights or {}).items():
                # Behind the quantizer, which calls that share a weight may share.
                node = self.reading.nodes[name]
                instead = _Instead(self.reading.layers[name].operation.layout(weight))
                handle = hook_input(self.model, node, instead, WEIGHT_PORT)
                stack.callback(handle.remove)
            for name, shift in (shifts or {}).items():
                ones = [1] * self.reading.layers[name].operation.dimensions
                plus = _Plus(shift.view(-1, *ones))
                node = self.reading.nodes[name]
                stack.callback(hook_output(self.model, node, plus).remove)
            yield

    @contextmanager
    def _without_ours(self) -> Iterator[ExitStack]:
        """Float biases, and none of our hooks at work."""
        with ExitStack() as stack:
            stack.enter_context(parameter_values(self.model, self.moved))
            for module in self.model.modules():
                if isinstance(module, OURS):
                    stack.enter_context(replaced(module, "forward", _identity))
            yield stack

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Report every run of a layer: its quantized input and its output."""
        with ExitStack() as stack:
            for name in self.reading.layers:
                node = self.reading.nodes[name]
                watch = _Watch(name, observer)
                stack.callback(hook_input(self.model, node, watch.tap).remove)
                stack.callback(hook_output(self.model, node, watch, (_Plus,)).remove)
            yield

    @property
    def biases_moved(self) -> bool:
        """Whether NNCF has corrected biases that the reference still has."""
        return bool(self._float_biases)

    @property
    def _float_biases(self) -> Mapping[str, Tensor]:
        return {
            name: value
            for name, value in self.moved.items()
            if not name.endswith(".weight") and value.ndim == 1
        }

    def quantize(
        self, weights: Mapping[str, Tensor], bits: Mapping[str, int] | None = None
    ) -> Mapping[str, Tensor]:
        """What the layers' quantizers make of their own weights, at other bit widths.

        Raises:
            ModelError: Other weights are given, which the model's, NNCF's only copy of
                the float ones, would have to give way to.
            ConfigError: A width is not from 2 to 8.
        """
        layers, made = self.reading.layers, {}
        for name, value in weights.items():
            layer = layers[name]
            if not torch.equal(value.to(layer.weight), layer.weight):
                raise ModelError(_OWN_WEIGHTS)
            width = (bits or {}).get(name)
            made[name] = layer.dequantized
            if width is not None and width != layer.weight_bits:
                check_bits(f"{name}: bits", width)
                quantizer = self.reading.quantizers[name]
                held, _ = self.reading.weights[quantizer]
                other: Any = copy.deepcopy(quantizer)
                vars(other).pop("forward", None)  # `prepared` replaces it.
                set_bits(other, width, held)
                with torch.no_grad():
                    made[name] = layer.operation.layout(other(held).detach())
        return made

    def widen(self, bits: Mapping[str, int]) -> None:
        """Quantize layers at other bit widths, in place, as `LayerBits` would.

        The host has read the layers as they were: go on with a new one.

        Args:
            bits: Bit widths by layer name.

        Raises:
            ConfigError: A width is not from 2 to 8.
        """
        for name, width in bits.items():
            check_bits(f"{name}: bits", width)
        for name, width in bits.items():
            quantizer = self.reading.quantizers[name]
            held, _ = self.reading.weights[quantizer]
            set_bits(quantizer, width, held)

    def correct(self, correction: Correction) -> None:
        """Replace the model's correction; if that fails, the one before stays."""
        self._standing = replace_correction(
            self._standing, correction, self._fingerprints, self._insert, self._remove
        )

    @property
    def correction(self) -> Correction:
        """What stands beside the layers."""
        return self._standing

    @property
    def roles(self) -> Mapping[str, Role]:
        """What the model's parameters are, by name."""
        return roles(self.model, self._example)

    def training(self, scales: bool = False) -> Training:
        """Latent weights want gradients; scales of weights stand still.

        Raises:
            ModelError: No weight can be trained.
        """
        return training(self.model, self._example, scales)

    def renew(self, correction: Correction | None = None) -> None:
        """Store adapters as trained, or others, for the weights as they are now."""
        given = trained_correction(self.model) if correction is None else correction
        self._forget()
        self.correct(given)

    def fresh(self) -> "NNCFHost":
        """A host whose float weights are the latent ones now.

        Raises:
            ModelError: The model carries adapters.
        """
        return NNCFHost(self.model, self._example)

    def _forget(self) -> None:
        """What was read of the model before it was trained, biases included."""
        self._reference = None
        self._changed_biases.clear()
        for stale in ("reading", "moved", "_fingerprints"):
            vars(self).pop(stale, None)

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """The settings that the adapters were made with."""
        return vars(self.model).get("cora_config")

    def note(self, settings: Mapping[str, Any] | None) -> None:
        """Store the settings that the adapters were made with."""
        vars(self.model)["cora_config"] = settings

    def _insert(self, correction: Correction) -> None:
        reading = self.reading
        where = self.model, reading.layers, reading.nodes
        if correction.weights:
            raise ModelError(_OWN_WEIGHTS)
        insert_hooks(*where, correction.adapters, correction.shifts)
        if correction.float_biases:
            for name, value in self._float_biases.items():
                parameter = self.model.get_parameter(name)
                self._changed_biases[name] = parameter.detach().clone()
                parameter.data.copy_(value)

    def _remove(self) -> None:
        remove_hooks(self.model)
        for name, value in self._changed_biases.items():
            self.model.get_parameter(name).data.copy_(value)
        self._changed_biases.clear()


class _Watch(nn.Module):
    """First post-hook of a layer but for trial shifts: reports what goes in and out."""

    def __init__(self, name: str, observer: Observer) -> None:
        super().__init__()
        self._name = name
        self._observer = observer
        self.tap = _Tap()

    def forward(self, y: Tensor) -> Tensor:
        """The output as it is."""
        x, self.tap.x = self.tap.x, None
        if x is None:
            raise ModelError(
                f"{self._name}: an output came without its input; run the model in one "
                "thread at a time while it is calibrated"
            )
        # Not traced: the statistics are none of NNCF's business, and cost time there.
        with torch._C.DisableTorchFunction():
            self._observer(self._name, x, y)
        return y


class _Tap(nn.Module):
    """Last pre-hook of a layer's input."""

    x: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The input as it is."""
        self.x = x
        return x


class _Instead(nn.Module):
    """Last pre-hook of a layer's weight: another weight in its place."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._value = (value,)  # In a tuple, or a parameter would be registered.

    def forward(self, _: Tensor) -> Tensor:
        """The other weight."""
        return self._value[0]


class _Plus(nn.Module):
    """First post-hook of a layer: adds a constant."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._value = (value,)

    def forward(self, y: Tensor) -> Tensor:
        """The output, shifted."""
        return y + self._value[0].to(y)


def _constant(value: Tensor) -> Callable[[Any], Tensor]:
    return lambda _: value


def _identity(x: Any) -> Any:
    return x
