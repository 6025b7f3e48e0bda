"""The host of a Brevitas model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.host import Observer, Role
from cora_plugin.integrations.brevitas.fast import fused_activations
from cora_plugin.integrations.brevitas.insert import (
    Branches,
    corrected,
    insert_correction,
    note_config,
    read_config,
    read_correction,
    remove_correction,
)
from cora_plugin.integrations.brevitas.layers import (
    SUPPORTED,
    Reference,
    bits_of,
    kind_of,
    read_layers,
    unpack,
)
from cora_plugin.integrations.brevitas.private import (
    INNER_FORWARD,
    hand_on_input,
    injector,
    is_pruned,
    learns_rounding,
    needs_scale,
    quantization_status_manager,
    with_value,
)
from cora_plugin.integrations.brevitas.training import (
    roles,
    settle,
    trained_correction,
    training,
)
from cora_plugin.integrations.host import (
    refuse_carriers,
    replace_correction,
)
from cora_plugin.integrations.provenance import fingerprints
from cora_plugin.integrations.restored import restored
from cora_plugin.integrations.scopes import (
    Flag,
    evaluation,
    flagged,
    flags_within,
    replaced,
    without_gradients,
)
from cora_plugin.integrations.training import Training
from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.outputs import Batch, Outputs, run


class BrevitasHost:
    """Implements `cora_plugin.host.Host` for a model quantized with Brevitas.

    Args:
        model: The quantized, calibrated model.
        reference: Its float weights, where the model has lost them.

        carrying: Whether the model may carry adapters already, which then stand.

    Raises:
        ModelError: The model already carries adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference | None = None,
        carrying: bool = False,
    ) -> None:
        if not carrying:
            refuse_carriers(corrected(model))
        self.model = model
        self._reference = reference
        self._standing = read_correction(model)
        self._requantized: dict[str, Any] = {}
        self._off: dict[bool, list[Flag]] = {}
        self._branches = Branches()

    @cached_property
    def _read(
        self,
    ) -> tuple[dict[str, QuantizedLayer], dict[str, str], dict[str, QuantTensor]]:
        with evaluation(self.model):
            return read_layers(self.model, self._reference)

    @cached_property
    def _fingerprints(self) -> dict[str, Fingerprint]:
        return fingerprints(self.layers)

    @property
    def layers(self) -> Sequence[QuantizedLayer]:
        """The layers that can carry an adapter, in module order."""
        return list(self._read[0].values())

    @property
    def skipped(self) -> Mapping[str, str]:
        """Layers that cannot carry an adapter, with the reason."""
        return self._read[1]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Evaluation mode, no parameter gradients, each weight quantized only once."""
        with ExitStack() as stack:
            stack.enter_context(restored(self.model))
            stack.enter_context(evaluation(self.model))
            stack.enter_context(without_gradients(self.model))
            for name, weight in self._read[2].items():
                layer = self._module(name)
                quantize = _once(layer, weight, self._requantized, name)
                stack.enter_context(replaced(layer, "quant_weight", quantize))
            for quantizer, kernel in fused_activations(self.model):
                stack.enter_context(replaced(quantizer, "forward", kernel))
            # They hold beside corrections, too: a layer whose weight quantizer is off
            # does not run its branch.
            off = {each: self._flags_off(each) for each in (False, True)}
            stack.enter_context(replaced(self, "_off", off))
            yield

    def run(self, batch: Batch) -> Outputs:
        """The model's outputs, plain tensors on the model's device."""
        try:
            return run(self.model, batch, unpack)
        except (AssertionError, RuntimeError) as error:
            if not needs_scale(error):
                raise
            raise ModelError(
                f"a layer needs the scale of its input ({error}), and a convolution "
                "or linear layer right before it hands on a plain tensor while weights "
                "are tried; put a quantizer between them (QuantIdentity with "
                "return_quant_tensor=True), or give the layer before an output_quant"
            ) from error

    @contextmanager
    def acting(
        self,
        weights: Mapping[str, Tensor] | None = None,
        shifts: Mapping[str, Tensor] | None = None,
        quantized: bool = True,
    ) -> Iterator[None]:
        """Other weights and shifts; the rest quantized or float."""
        others = self._laid_out({layer.name: layer.weight for layer in self.layers})
        if quantized:
            others = {name: unpack(each) for name, each in self._read[2].items()}
        with ExitStack() as stack:
            for name, shift in (shifts or {}).items():
                module = self._module(name)
                inner = _shifted(module, shift)
                stack.enter_context(replaced(module, INNER_FORWARD, inner))
            values = {**others, **self._laid_out(weights or {})}
            stack.enter_context(self._plain_weights(values, not quantized))
            yield

    def _laid_out(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by layer name as Brevitas' layers hold them, and back."""
        layers = self._read[0]
        return {n: layers[n].operation.layout(each) for n, each in weights.items()}

    @contextmanager
    def _plain_weights(
        self, values: Mapping[str, Tensor], disable_act_quant: bool
    ) -> Iterator[None]:
        """These weights, elsewhere the float ones that Brevitas holds."""
        off = self._off.get(disable_act_quant) or self._flags_off(disable_act_quant)
        with ExitStack() as stack:
            for name, value in values.items():
                module = self._module(name)
                stack.enter_context(replaced(module, "quant_weight", _given(value)))
            stack.enter_context(flagged(off))
            yield

    def _flags_off(self, disable_act_quant: bool) -> list[Flag]:
        """What Brevitas sets to switch quantizers of weights off, and perhaps all."""
        manager = quantization_status_manager(
            self.model,
            disable_act_quant=disable_act_quant,
            disable_weight_quant=True,
            disable_bias_quant=True,
            is_training=False,
        )
        return flags_within(manager, self.model)

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Report every run of a layer: its quantized input and its output."""
        with ExitStack() as stack:
            for layer in self.layers:
                module = self._module(layer.name)
                inner = _reporting(module, layer.name, observer)
                stack.enter_context(replaced(module, INNER_FORWARD, inner))
            yield

    def quantize(
        self, weights: Mapping[str, Tensor], bits: Mapping[str, int] | None = None
    ) -> Mapping[str, Tensor]:
        """What the layers' own quantizers make of float weights.

        Raises:
            ModelError: The main weights are not plain roundings of the float ones, or
                a layer cannot be quantized at one of the widths.
        """
        quantized = {}
        for name, value in weights.items():
            layer = self._module(name)
            if is_pruned(layer) and bits is None:
                raise ModelError(
                    f"{name}: torch's pruning computes its weight as it runs, so that "
                    "no other can be put in; call prune.remove(layer, 'weight') before "
                    "quantizing, or use alternations=0"
                )
            held = layer.weight.detach()
            read = self._read[0][name]
            given = read.operation.layout(read.weight)
            learned = bits is not None and learns_rounding(layer.weight_quant)
            if learned or not torch.equal(held.to(given), given):
                way_out = "use alternations=0 with this recipe"
                if bits is not None:
                    way_out = "plan bit widths before it, and round at layer_bits"
                raise ModelError(
                    f"{name}: its weight was rounded by GPTQ, learned round or the "
                    f"like, which quantizing it anew would undo; {way_out}"
                )
            width = (bits or {}).get(name)
            if width == read.weight_bits:
                width = None  # Its own quantizer, whose scale may have been trained.
            if width is None and torch.equal(value, read.weight):
                quantized[name] = read.dequantized
                continue
            try:
                layer.weight.data = read.operation.layout(value.to(held))
                with torch.no_grad():
                    made = _quantized(name, layer, width)
                quantized[name] = read.operation.layout(unpack(made).detach())
            finally:
                layer.weight.data = held
        return quantized

    def widen(self, bits: Mapping[str, int]) -> None:
        """Give layers weight quantizers of other bit widths, in place.

        Activations keep their ranges, which Brevitas calibrates with float weights. The
        host has read the layers as they were: go on with a new one.

        Args:
            bits: Bit widths by layer name.

        Raises:
            ModelError: A quantizer has no bit width that could be another.
        """
        for name, width in bits.items():
            layer = self._module(name)
            with _at_width(name, width), torch.no_grad():
                layer.weight_quant, _ = _requantized(layer, width)

    def correct(self, correction: Correction) -> None:
        """Replace the model's correction; if that fails, the one before stays."""
        self._standing = replace_correction(
            self._standing,
            correction,
            self._fingerprints,
            partial(insert_correction, self.model, branches=self._branches),
            partial(remove_correction, self.model),
        )
        self._requantized.clear()
        for name in correction.weights:
            layer = self._module(name)
            with torch.no_grad(), evaluation(layer):
                self._requantized[name] = type(layer).quant_weight(layer)

    @property
    def correction(self) -> Correction:
        """What stands beside the layers."""
        return self._standing

    @property
    def roles(self) -> Mapping[str, Role]:
        """What the model's parameters are, by name."""
        return roles(self.model)

    def training(self, scales: bool = False) -> Training:
        """Latent weights want gradients; scales of weights are values that stand still.

        Raises:
            ModelError: No weight can be trained, or alternation has replaced one.
        """
        for name in self._standing.weights:
            raise ModelError(
                f"{name}: alternation has replaced its weight by what the adapter "
                "leaves of it, which cannot be trained; make the adapters with "
                "alternations=0"
            )
        return training(self.model, scales)

    def renew(self, correction: Correction | None = None) -> None:
        """Store adapters as trained, or others, for the weights as they are now."""
        given = trained_correction(self.model) if correction is None else correction
        settle(self.model)
        self._reference = None
        for stale in ("_read", "_fingerprints"):
            vars(self).pop(stale, None)
        settings = self.settings
        self.correct(given)
        self.note(settings)

    def fresh(self) -> "BrevitasHost":
        """A host whose float weights are the latent ones now.

        Raises:
            ModelError: The model carries adapters.
        """
        settle(self.model)
        return BrevitasHost(self.model)

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """The settings that the adapters were made with."""
        return read_config(self.model)

    def note(self, settings: Mapping[str, Any] | None) -> None:
        """Store the settings that the adapters were made with."""
        note_config(self.model, settings)

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)


def _once(
    layer: Any, weight: QuantTensor, others: Mapping[str, QuantTensor], name: str
) -> Any:
    """Answer with a ready quantized weight: MSE scales take seconds a forward pass.

    Args:
        layer: The layer.
        weight: Its quantized weight.
        others: Quantized weights that stand in place of layers' own, by name.
        name: The layer's name.
    """
    quantize = layer.quant_weight

    def quant_weight(*args: Any, **kwargs: Any) -> Any:
        if layer.weight_quant.disable_quant:
            return quantize(*args, **kwargs)
        return others.get(name, weight)

    return quant_weight


def _given(weight: Tensor) -> Any:
    return lambda *args, **kwargs: weight


def _shifted(layer: Any, shift: Tensor) -> Any:
    inner = getattr(layer, INNER_FORWARD)

    def inner_forward_impl(*args: Any) -> Any:
        result = inner(*args)
        y = unpack(result)
        ones = [1] * SUPPORTED[kind_of(layer)]
        return with_value(result, y + shift.to(y).view(-1, *ones))

    return inner_forward_impl


def _reporting(layer: Any, name: str, observer: Observer) -> Any:
    inner = getattr(layer, INNER_FORWARD)

    def inner_forward_impl(x: Any, quant_weight: Any, quant_bias: Any) -> Any:
        y = inner(x, quant_weight, quant_bias)
        observer(name, unpack(x), unpack(y))
        return y

    return inner_forward_impl


def _quantized(name: str, layer: Any, bits: int | None) -> Any:
    """The layer's weight as its quantizer rounds it, perhaps at another bit width.

    Raises:
        ModelError: The quantizer has no bit width that could be another.
    """
    if bits is None:
        return type(layer).quant_weight(layer)
    with _at_width(name, bits):
        return _requantized(layer, bits)[1]


def _requantized(layer: Any, bits: int) -> tuple[Any, Any]:
    """A quantizer like that of the layer's weight at another width, and what it makes.

    Raises:
        ValueError: It has no bit width that could be another.
    """
    proxy = layer.weight_quant
    other = type(proxy)(layer, injector(proxy).let(bit_width=bits))
    other = other.to(layer.weight.device).eval()
    hand_on_input(proxy, other)
    made = other(layer.weight)
    if bits_of(made) != bits:
        raise ValueError(f"it stays at {bits_of(made):g}")
    return other, made


@contextmanager
def _at_width(name: str, bits: int) -> Iterator[None]:
    """Say of a failure which layer could not have which bit width."""
    if bits < 1:
        raise ModelError(f"{name}: {bits} bits are none; use 1 or more")
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"{name}: its weight quantizer does not work at {bits} bits ({error}); bit "
            "widths can be planned where weights are quantized to integers, so pin "
            "this layer at its own, or leave the menu out"
        ) from error
