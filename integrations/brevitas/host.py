"""A Brevitas model as the algorithm sees it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from brevitas.graph.calibrate import quantization_status_manager
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.integrations.brevitas.fast import fused_activations
from cora_plugin.integrations.brevitas.insert import (
    adapted,
    insert_adapters,
    remove_adapters,
)
from cora_plugin.integrations.brevitas.layers import Reference, read_layers, unpack
from cora_plugin.integrations.scopes import evaluation, replaced, without_gradients
from cora_plugin.layer import Observer, QuantizedLayer


class BrevitasHost:
    """Fulfils `cora_plugin.layer.Host` for a model quantized with Brevitas.

    Args:
        model: The quantized, calibrated model.
        reference: Where its float weights are, when it does not hold them any more.

    Raises:
        CoRaError: The model already carries adapters.
    """

    def __init__(self, model: nn.Module, reference: Reference | None = None) -> None:
        carried = adapted(model)
        if carried:
            raise CoRaError(
                f"{next(iter(carried))}: already carries an adapter; call "
                "remove_cora(model) first"
            )
        self.model = model
        self._reference = reference

    @cached_property
    def _read(
        self,
    ) -> tuple[dict[str, QuantizedLayer], dict[str, str], dict[str, QuantTensor]]:
        with evaluation(self.model):
            return read_layers(self.model, self._reference)

    @property
    def layers(self) -> Sequence[QuantizedLayer]:
        """The layers that can carry an adapter, in module order."""
        return list(self._read[0].values())

    @property
    def skipped(self) -> Mapping[str, str]:
        """Quantized layers that cannot, and why."""
        return self._read[1]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Evaluation mode, no parameter gradients, each weight quantized only once."""
        with ExitStack() as stack:
            stack.enter_context(evaluation(self.model))
            stack.enter_context(without_gradients(self.model))
            for name, weight in self._read[2].items():
                layer = self._module(name)
                quantize = _once(layer, weight)
                stack.enter_context(replaced(layer, "quant_weight", quantize))
            for quantizer, kernel in fused_activations(self.model):
                stack.enter_context(replaced(quantizer, "forward", kernel))
            yield

    def run(self, images: Tensor) -> Tensor:
        """The model's output, a plain tensor on the model's device."""
        first = next(self.model.parameters())
        output = self.model(images.to(first.device, first.dtype))
        if isinstance(output, tuple | list) and len(output) == 1:
            output = output[0]
        output = unpack(output)
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise CoRaError(
                f"the model's output is {type(output).__name__}, not logits [N, "
                "classes, …]; wrap the model so that its forward returns one tensor"
            )
        return output

    @contextmanager
    def float_model(self) -> Iterator[None]:
        """Float weights, float activations."""
        floats = {layer.name: layer.weight for layer in self.layers}
        with self._plain_weights(floats, disable_act_quant=True):
            yield

    @contextmanager
    def weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Quantized activations; these weights, elsewhere the quantized ones."""
        quantized = {name: unpack(each) for name, each in self._read[2].items()}
        with self._plain_weights({**quantized, **values}, disable_act_quant=False):
            yield

    @contextmanager
    def _plain_weights(
        self, values: Mapping[str, Tensor], disable_act_quant: bool
    ) -> Iterator[None]:
        """These weights, elsewhere the float ones that Brevitas holds."""
        manager = quantization_status_manager(
            self.model,
            disable_act_quant=disable_act_quant,
            disable_weight_quant=True,
            disable_bias_quant=True,
            is_training=False,
        )
        with ExitStack() as stack:
            for name, value in values.items():
                module = self._module(name)
                stack.enter_context(replaced(module, "quant_weight", _given(value)))
            stack.enter_context(manager)
            yield

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Report every run of a layer: its quantized input and its output."""
        with ExitStack() as stack:
            for layer in self.layers:
                module = self._module(layer.name)
                inner = _reporting(module, layer.name, observer)
                stack.enter_context(replaced(module, "inner_forward_impl", inner))
            yield

    def insert(self, adapters: Mapping[str, Adapter]) -> None:
        """Put adapters beside their layers; all or, after an error, none."""
        insert_adapters(self.model, adapters)

    def remove(self) -> None:
        """Take every adapter out again."""
        remove_adapters(self.model)

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)


def _once(layer: Any, weight: QuantTensor) -> Any:
    """Answer with a ready quantized weight: MSE scales take seconds a forward pass."""
    quantize = layer.quant_weight

    def quant_weight(*args: Any, **kwargs: Any) -> Any:
        if layer.weight_quant.disable_quant:
            return quantize(*args, **kwargs)
        return weight

    return quant_weight


def _given(weight: Tensor) -> Any:
    return lambda *args, **kwargs: weight


def _reporting(layer: Any, name: str, observer: Observer) -> Any:
    inner = layer.inner_forward_impl

    def inner_forward_impl(x: Any, quant_weight: Any, quant_bias: Any) -> Any:
        y = inner(x, quant_weight, quant_bias)
        observer(name, unpack(x), unpack(y))
        return y

    return inner_forward_impl
