"""Puts adapters into Brevitas layers: a subclass that adds the branch's output.

The subclass sees the quantized input on every backend, and Brevitas' own machinery
(bias correction, inference mode, exporters, deepcopy) goes on to work with it.
"""

from collections.abc import Mapping
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.quant import Int8WeightPerChannelFloat
from torch import Tensor, nn

from cora_plugin.adapters import Adapter, Kind
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.quantized import FLOAT_BITS
from cora_plugin.integrations.brevitas.layers import SUPPORTED, operation_of, unpack


class QuantBranch(nn.Module):
    """An adapter as Brevitas layers, whose weights export as integers."""

    def __init__(self, layer: Any, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter
        self.kind = adapter.kind
        self.weight_shape = adapter.weight_shape
        self.operation = operation_of(layer)
        if adapter.kind is Kind.SHARED_BASIS:
            # Linear layers, applied to the identity: (B (A I))ᵀ is the kernel's rows,
            # stored as two small integer weights and multiplied when it is loaded.
            self.a = _quant_linear(adapter.a.dequantize(), adapter.a.bits)
            self.b = _quant_linear(_second(adapter), adapter.a.bits)
            self.register_buffer(
                "identity", torch.eye(adapter.a.values.shape[1]), persistent=False
            )
        else:
            self.a = _like(layer, adapter.a.dequantize(), adapter.a.bits)
            if adapter.kind is Kind.LOW_RANK:
                self.b = _pointwise(layer, _second(adapter), adapter.a.bits)
        weight = layer.weight
        self.to(device=weight.device, dtype=weight.dtype)
        self.requires_grad_(False)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """The share of the layer's output that the adapter gives back."""
        if self.kind is Kind.SHARED_BASIS:
            rows = self.b(self.a(self.identity))  # [k, m]
            return self.operation(x, rows.t().reshape(self.weight_shape))
        y: Tensor = self.a(x)
        return self.b(y) if self.kind is Kind.LOW_RANK else y


class _Adapted:
    """Mixed into a Brevitas layer that carries a branch in `cora`."""

    cora: QuantBranch
    weight_quant: Any

    def inner_forward_impl(
        self, x: Any, quant_weight: Any, quant_bias: Tensor | None
    ) -> Any:
        y = super().inner_forward_impl(x, quant_weight, quant_bias)  # type: ignore[misc]
        # Without weight quantization this is Brevitas' float reference, which owes
        # nothing to an adapter.
        if self.weight_quant.disable_quant:
            return y
        return unpack(y) + self.cora(unpack(x))


class CoRaQuantLinear(_Adapted, qnn.QuantLinear):
    """A QuantLinear with an adapter."""

    cora_base = qnn.QuantLinear


class CoRaQuantConv1d(_Adapted, qnn.QuantConv1d):
    """A QuantConv1d with an adapter."""

    cora_base = qnn.QuantConv1d


class CoRaQuantConv2d(_Adapted, qnn.QuantConv2d):
    """A QuantConv2d with an adapter."""

    cora_base = qnn.QuantConv2d


class CoRaQuantConv3d(_Adapted, qnn.QuantConv3d):
    """A QuantConv3d with an adapter."""

    cora_base = qnn.QuantConv3d


_ADAPTED = {
    kind.cora_base: kind
    for kind in (CoRaQuantLinear, CoRaQuantConv1d, CoRaQuantConv2d, CoRaQuantConv3d)
}


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that carry an adapter, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _Adapted)}


def insert_adapters(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters beside their layers; all or, after an error, none.

    Raises:
        CoRaError: A layer is missing, of another shape, or already carries one.
    """
    modules = dict(model.named_modules())
    branches = []
    for name, adapter in adapters.items():
        layer = modules.get(name)
        if type(layer) in _ADAPTED.values():
            raise CoRaError(
                f"{name}: already carries an adapter; call remove_cora(model) first"
            )
        if layer is None or type(layer) not in _ADAPTED:
            raise CoRaError(
                f"{name}: the model has no quantized layer of this name that can carry "
                "an adapter; quantize it by the recipe the adapters were made for"
            )
        shape = tuple(layer.weight.shape)
        if shape != adapter.weight_shape:
            raise CoRaError(
                f"{name}: the adapter is for a weight of shape "
                f"{list(adapter.weight_shape)}, the layer's is {list(shape)}"
            )
        groups = getattr(layer, "groups", 1)
        if groups != adapter.groups:
            raise CoRaError(
                f"{name}: the adapter is for {adapter.groups} groups, the layer has "
                f"{groups}"
            )
        branches.append((layer, QuantBranch(layer, adapter)))
    for layer, branch in branches:
        layer.__class__ = _ADAPTED[type(layer)]
        layer.cora = branch
        layer.cora_returned_quant_tensor = layer.return_quant_tensor
        # A sum of float outputs has no scale of its own to return.
        if not layer.output_quant.is_quant_enabled:
            layer.return_quant_tensor = False


def remove_adapters(model: nn.Module) -> None:
    """Take every adapter out of a model."""
    for layer in adapted(model).values():
        layer.__class__ = type(layer).cora_base
        layer.return_quant_tensor = layer.cora_returned_quant_tensor
        del layer.cora, layer.cora_returned_quant_tensor


def read_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that a model carries, by layer name."""
    return {name: layer.cora.adapter for name, layer in adapted(model).items()}


def _second(adapter: Adapter) -> Tensor:
    if adapter.b is None:
        raise CoRaError(f"a {adapter.kind} adapter must have a second factor")
    return adapter.b.dequantize()


def _arguments(bits: int) -> dict[str, Any]:
    quantizer = None
    if bits != FLOAT_BITS:
        quantizer = Int8WeightPerChannelFloat.let(bit_width=bits)
    return {"bias": False, "weight_quant": quantizer, "return_quant_tensor": False}


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.get_parameter("weight").data.copy_(weight)
    return layer


def _quant_linear(weight: Tensor, bits: int) -> nn.Module:
    rows, columns = weight.shape
    return _with_weight(qnn.QuantLinear(columns, rows, **_arguments(bits)), weight)


def _like(layer: Any, weight: Tensor, bits: int) -> nn.Module:
    """A layer that slides as `layer` does, with other filters."""
    kind = type(layer)
    if not SUPPORTED[kind]:
        return _quant_linear(weight, bits)
    made = kind(
        layer.in_channels,
        weight.shape[0],
        layer.kernel_size,
        stride=layer.stride,
        padding="same" if layer.is_same_padded_strided else layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        **_arguments(bits),
    )
    return _with_weight(made, weight)


def _pointwise(layer: Any, weight: Tensor, bits: int) -> nn.Module:
    kind = type(layer)
    if not SUPPORTED[kind]:
        return _quant_linear(weight, bits)
    made = kind(
        weight.shape[1] * layer.groups,
        weight.shape[0],
        1,
        groups=layer.groups,
        **_arguments(bits),
    )
    return _with_weight(made, weight)
