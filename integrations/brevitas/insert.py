"""Puts adapters into Brevitas layers: a subclass that adds the branch's output.

The subclass sees the quantized input on every backend, and Brevitas' own machinery
(bias correction, inference mode, exporters, deepcopy) goes on to work with it.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import brevitas.nn as qnn
from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
from torch import Tensor, nn

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.adapter import by_term, flat_name
from cora_plugin.adapters.form import Role
from cora_plugin.adapters.quantized import QuantizedTensor
from cora_plugin.integrations.brevitas.layers import (
    SUPPORTED,
    kind_of,
    operation_of,
    quantized_weight,
    unpack,
)
from cora_plugin.integrations.brevitas.order import unwatch_rounding, watch_rounding
from cora_plugin.integrations.brevitas.private import is_same_padded, with_value
from cora_plugin.integrations.host import check_fit, refuse_carriers
from cora_plugin.integrations.provenance import check_made_for
from cora_plugin.integrations.scopes import evaluation
from cora_plugin.layer import Correction


class QuantBranch(nn.Module):
    """An adapter as Brevitas layers, whose weights export as integers.

    They have the names of the adapter's tensors. With `in_int8` the adapter's rounding
    shift is added as well: for exports that round the merged weight to 8 bits, and for
    them alone.
    """

    rounding_shift: Tensor | None

    def __init__(self, layer: Any, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter
        self.config: Mapping[str, Any] | None = None
        self.operation = operation_of(layer)
        for index, term in enumerate(adapter.terms):
            for name, role in term.form.roles.items():
                made = _MADE[role](layer, term.tensors[name])
                self.add_module(flat_name(name, index), made)
        self.in_int8 = False
        rounding = adapter.rounding_shift
        shift = None if rounding is None else _shift(layer, rounding)
        self.register_buffer("rounding_shift", shift)
        weight = layer.weight
        self.to(device=weight.device, dtype=weight.dtype)
        self.requires_grad_(False)
        self.train(layer.training)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The share of the layer's output that each term gives back."""
        shares = []
        layers: dict[str, Any] = dict(self.named_children())
        for form, parts in by_term(self.adapter.forms, layers):
            if form.runs_merged or self.operation.transposed:
                weights = {n: unpack(part.quant_weight()) for n, part in parts.items()}
                shares.append(form.run(self.operation, x, weights))
            else:
                shares.append(reduce(lambda y, part: part(y), parts.values(), x))
        if self.in_int8 and self.rounding_shift is not None:
            shares.append(self.rounding_shift)
        return tuple(shares)


class Branches:
    """The branches of one model's layers, kept, for building one takes milliseconds.

    Steps are judged with the same adapters again and again, beside other shifts.
    """

    KEPT = 3
    """The last so many of each layer."""

    def __init__(self) -> None:
        self._made: dict[str, list[QuantBranch]] = {}

    def __call__(self, name: str, layer: Any, adapter: Adapter) -> QuantBranch:
        """The branch of a layer's adapter, made or found."""
        found = self._made.setdefault(name, [])
        for branch in found:
            # Notes apart, an adapter is its terms.
            shift = branch.adapter.rounding_shift
            if branch.adapter.terms is adapter.terms and (
                shift is adapter.rounding_shift
            ):
                branch.adapter = adapter
                return branch
        branch = QuantBranch(layer, adapter)
        found.insert(0, branch)
        del found[self.KEPT :]
        return branch


class _Adapted:
    """Mixed into a Brevitas layer that carries a branch, or a shift, or both.

    `cora_float_weight` is the weight that the layer was quantized with, where an
    adapter and the quantization of what it leaves have been alternated.
    """

    cora: QuantBranch | None
    cora_shift: Tensor | None
    cora_float_weight: Tensor | None
    weight_quant: Any

    def inner_forward_impl(
        self, x: Any, quant_weight: Any, quant_bias: Tensor | None
    ) -> Any:
        inner = super().inner_forward_impl  # type: ignore[misc]
        # Without weight quantization this is Brevitas' float reference, which owes
        # nothing to a correction.
        if self.weight_quant.disable_quant:
            original = self.cora_float_weight
            weight = quant_weight if original is None else original
            return inner(x, weight, quant_bias)
        result = inner(x, quant_weight, quant_bias)
        y = unpack(result)
        if self.cora is not None:
            # One by one: exports fold what is added to a layer's own output.
            for share in self.cora(unpack(x)):
                y = y + share
        # Last, where exports for int8 kernels find it once the adapter is folded.
        y = y if self.cora_shift is None else y + self.cora_shift
        return with_value(result, y)


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


class CoRaQuantConvTranspose1d(_Adapted, qnn.QuantConvTranspose1d):
    """A QuantConvTranspose1d with an adapter."""

    cora_base = qnn.QuantConvTranspose1d


class CoRaQuantConvTranspose2d(_Adapted, qnn.QuantConvTranspose2d):
    """A QuantConvTranspose2d with an adapter."""

    cora_base = qnn.QuantConvTranspose2d


class CoRaQuantConvTranspose3d(_Adapted, qnn.QuantConvTranspose3d):
    """A QuantConvTranspose3d with an adapter."""

    cora_base = qnn.QuantConvTranspose3d


_ADAPTED: dict[type[Any], type[Any]] = {
    each.cora_base: each
    for each in (
        CoRaQuantLinear,
        CoRaQuantConv1d,
        CoRaQuantConv2d,
        CoRaQuantConv3d,
        CoRaQuantConvTranspose1d,
        CoRaQuantConvTranspose2d,
        CoRaQuantConvTranspose3d,
    )
}


def carries(layer: Any) -> bool:
    """Whether a layer can be given an adapter: it is of a supported kind."""
    return layer is not None and kind_of(layer) in SUPPORTED


def _adapted(base: type[Any]) -> type[Any]:
    """The type of a layer with an adapter; made where a user's subclass has one."""
    if base not in _ADAPTED:
        members = {"cora_base": base, "__doc__": f"A {base.__name__} with an adapter."}
        _ADAPTED[base] = type(f"CoRa{base.__name__}", (_Adapted, base), members)
    return _ADAPTED[base]


class _Factor:
    """Mixed into a branch's layers, which bias correction would give zeros to store."""

    def register_parameter(self, name: str, value: nn.Parameter | None) -> None:
        if name != "bias" or value is None:
            super().register_parameter(name, value)  # type: ignore[misc]


class QuantFactorLinear(_Factor, qnn.QuantLinear):
    """A factor of a linear layer's adapter, or of a shared basis."""


class QuantFactorConv1d(_Factor, qnn.QuantConv1d):
    """A factor of a convolution's adapter over one axis."""


class QuantFactorConv2d(_Factor, qnn.QuantConv2d):
    """A factor of a convolution's adapter over two axes."""


class QuantFactorConv3d(_Factor, qnn.QuantConv3d):
    """A factor of a convolution's adapter over three axes."""


_FACTOR: dict[int, Any] = {
    1: QuantFactorConv1d,
    2: QuantFactorConv2d,
    3: QuantFactorConv3d,
}


def corrected(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that carry an adapter or a shift, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _Adapted)}


def in_int8(model: nn.Module, wanted: bool) -> dict[str, str]:
    """Have a model's layers add their rounding shifts, or forget them.

    Args:
        model: A copy that is about to be exported.
        wanted: Whether the export rounds merged weights to 8 bits.

    Returns:
        Layer names by the name of the buffer that is added.
    """
    names = {}
    for name, layer in corrected(model).items():
        if layer.cora is None or layer.cora.rounding_shift is None:
            continue
        layer.cora.in_int8 = wanted
        if wanted:
            names[f"{name}.cora.rounding_shift"] = name
        else:
            layer.cora.rounding_shift = None
    return names


def insert_correction(
    model: nn.Module, correction: Correction, branches: Branches | None = None
) -> None:
    """Put a correction into a model; if anything fails, the model is left unchanged.

    Args:
        model: The model.
        correction: What to put in.
        branches: Those made for this model before; None: none.

    Raises:
        ModelError: A layer is missing, does not fit, or already carries one.
    """
    names = [*{**correction.adapters, **correction.shifts, **correction.weights}]
    carriers = corrected(model)
    refuse_carriers(name for name in names if name in carriers)
    modules = dict(model.named_modules())
    make = Branches() if branches is None else branches
    parts = []
    for name in names:
        layer: Any = modules.get(name)
        weight = None
        if carries(layer):
            weight = operation_of(layer).layout(layer.weight)
        adapter, given = correction.adapters.get(name), correction.shifts.get(name)
        check_fit(name, weight, getattr(layer, "groups", 1), adapter, given)
        branch = None if adapter is None else make(name, layer, adapter)
        shift = None if given is None else _shift(layer, given)
        parts.append((name, layer, branch, shift, correction.weights.get(name)))
    for name, layer, branch, shift, weight in parts:
        layer.__class__ = _adapted(type(layer))
        layer.cora = branch
        watch_rounding(name, layer)
        layer.register_buffer("cora_shift", shift)
        layer.register_buffer("cora_float_weight", None, persistent=False)
        if weight is not None:
            layer.cora_float_weight = layer.weight.detach().clone()
            layer.weight.data.copy_(operation_of(layer).layout(weight))


def _shift(layer: Any, shift: Tensor) -> Tensor:
    """A shift [m] in the shape that adds to a layer's output."""
    return shift.to(layer.weight).view(-1, *[1] * SUPPORTED[kind_of(layer)])


def remove_correction(model: nn.Module) -> None:
    """Take a correction out of a model."""
    for layer in corrected(model).values():
        layer.__class__ = type(layer).cora_base
        if layer.cora_float_weight is not None:
            layer.weight.data.copy_(layer.cora_float_weight)
        del layer.cora, layer.cora_shift, layer.cora_float_weight
        unwatch_rounding(layer)


def read_correction(model: nn.Module) -> Correction:
    """The correction that a model carries."""
    layers = corrected(model).items()
    return Correction(
        {n: layer.cora.adapter for n, layer in layers if layer.cora is not None},
        {
            name: layer.cora_shift.detach().flatten().clone()
            for name, layer in layers
            if layer.cora_shift is not None
        },
        {
            name: operation_of(layer).layout(layer.weight.detach().clone())
            for name, layer in layers
            if layer.cora_float_weight is not None
        },
    )


def check_provenance(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Raise for the first adapter that was made for another quantized weight."""
    weights = {}
    for name, layer in model.named_modules():
        if name in adapters and carries(layer):
            with evaluation(layer):
                weights[name] = (*quantized_weight(layer), operation_of(layer))
    check_made_for(adapters, weights)


def note_config(model: nn.Module, config: Mapping[str, Any] | None) -> None:
    """Store with the adapters the settings that they were made with."""
    for layer in corrected(model).values():
        if layer.cora is not None:
            layer.cora.config = config


def read_config(model: nn.Module) -> Mapping[str, Any] | None:
    """The settings that a model's adapters were made with, where they are known."""
    branches = (layer.cora for layer in corrected(model).values())
    return next((branch.config for branch in branches if branch is not None), None)


def _arguments(stored: QuantizedTensor) -> dict[str, Any]:
    quantizer = None
    if stored.scale is not None:
        one = stored.scale.numel() == 1
        base = Int8WeightPerTensorFloat if one else Int8WeightPerChannelFloat
        quantizer = base.let(bit_width=stored.bits)
    return {"bias": False, "weight_quant": quantizer, "return_quant_tensor": False}


def _with_weight(layer: nn.Module, stored: QuantizedTensor) -> nn.Module:
    layer.get_parameter("weight").data.copy_(stored.dequantize())
    return layer


def _matrix(_: Any, stored: QuantizedTensor) -> nn.Module:
    """A layer that only holds a weight, so that exporters store it as integers."""
    return _quant_linear(stored)


def _quant_linear(stored: QuantizedTensor) -> nn.Module:
    rows, columns = stored.values.shape
    return _with_weight(QuantFactorLinear(columns, rows, **_arguments(stored)), stored)


def _like(layer: Any, stored: QuantizedTensor) -> nn.Module:
    """A layer that slides as `layer` does, with other filters.

    That of a transposed one only holds them, [g·r, n/g, *kernel]: in torch's layout,
    filters of several groups would have to share a scale.
    """
    dimensions = SUPPORTED[kind_of(layer)]
    if not dimensions:
        return _quant_linear(stored)
    shape = layer.in_channels, stored.values.shape[0], layer.kernel_size
    if layer.transposed:
        held = _FACTOR[dimensions](*shape, groups=layer.groups, **_arguments(stored))
        return _with_weight(held, stored)
    made = _FACTOR[dimensions](
        *shape,
        stride=layer.stride,
        padding="same" if is_same_padded(layer) else layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        **_arguments(stored),
    )
    return _with_weight(made, stored)


def _pointwise(layer: Any, stored: QuantizedTensor) -> nn.Module:
    dimensions = SUPPORTED[kind_of(layer)]
    if not dimensions:
        return _quant_linear(stored)
    rows, rank = stored.values.shape[:2]
    made = _FACTOR[dimensions](
        rank * layer.groups, rows, 1, groups=layer.groups, **_arguments(stored)
    )
    return _with_weight(made, stored)


_MADE = {Role.FILTERS: _like, Role.POINTWISE: _pointwise, Role.MATRIX: _matrix}
