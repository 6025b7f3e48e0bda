"""Puts adapters into NNCF's hooks: a tap on a layer's input, a branch on its output.

These are two modules, because one that is called at both places confuses tracers. Both
are stateful modules in NNCF's sense, so they survive deepcopy, `nncf.torch.get_config`
and `load_from_config(…, allowed_modules=("nncf.*", "cora_plugin.*"))`.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.quantization.layers import SymmetricQuantizer
from torch import Tensor, nn

from cora_plugin.adapters import Adapter, Form, Operation
from cora_plugin.adapters.adapter import flat_name
from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.adapters.form import earlier_fields
from cora_plugin.integrations.host import check_fit, refuse_carriers
from cora_plugin.integrations.nncf.private import (
    PTQuantizerSpec,
    RemovableHookHandle,
    StatefulModuleInterface,
    get_hook_storage,
    hook_places,
    is_wrapped,
)
from cora_plugin.layer import QuantizedLayer

_tapped = threading.local()
"""Per thread, the input that a tap saw; its layer's branch takes it right after."""

_CONVOLUTION: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class CoRaTap(nn.Module, StatefulModuleInterface):
    """Pre-hook on a layer's input: remembers it, quantized, for the branch.

    Args:
        node: NNCF's name of the operation.
    """

    def __init__(self, node: str) -> None:
        super().__init__()
        self.node = node

    def forward(self, x: Tensor) -> Tensor:
        """The input as it is."""
        _tapped.node, _tapped.x = self.node, x
        return x

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {"node": self.node}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "CoRaTap":
        """Build it from its configuration."""
        return cls(**state)


class CoRaBranch(nn.Module, StatefulModuleInterface):
    """Post-hook on a layer's output: adds the adapter's share, such as `B ∗ (A ∗ x)`.

    The adapter's tensors are parameters, of their names, behind NNCF's own weight
    quantizers, whose integers are the adapter's: exporters store them as they store any
    quantized weight.

    Args:
        layer: The layer's name.
        node: NNCF's name of its operation.
        terms: Fields of the `Form` of each term.
        weight_shape: Shape of the layer's weight.
        operation: Fields of the layer's `Operation`.
        fingerprint: Fields of the `Fingerprint` that the adapter was made for.
        rounding: Whether the adapter has a rounding shift, a buffer. It is added with
            `in_int8` alone: for exports that round the merged weight to 8 bits.
    """

    rounding_shift: Tensor | None

    def __init__(
        self,
        layer: str,
        node: str,
        terms: Sequence[Mapping[str, Any]],
        weight_shape: Sequence[int],
        operation: Mapping[str, Any],
        fingerprint: Mapping[str, Any] | None = None,
        rounding: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.node = layer, node
        self.fingerprint = None
        if fingerprint is not None:
            self.fingerprint = Fingerprint.read(fingerprint)
        self.operation = _operation(operation)
        groups = self.operation.groups
        self.forms = [Form.read(e, tuple(weight_shape), groups) for e in terms]
        self.in_int8 = False
        ones = [1] * self.operation.dimensions
        shift = torch.zeros(weight_shape[0], *ones) if rounding else None
        self.register_buffer("rounding_shift", shift)
        self.quantizers = nn.ModuleDict()
        for index, form in enumerate(self.forms):
            scales = form.scale_shapes
            for key, shape in form.shapes.items():
                name, values = flat_name(key, index), torch.zeros(shape)
                parameter = nn.Parameter(values, requires_grad=False)
                self.register_parameter(name, parameter)
                if key in scales:
                    # NNCF takes a scale of one axis for one of the whole tensor.
                    per_channel = form.scales_channels(key)
                    self.quantizers[name] = _weight_quantizer(
                        scales[key] if per_channel else (1,), form.bits
                    )

    @classmethod
    def of(cls, layer: QuantizedLayer, node: str, adapter: Adapter) -> "CoRaBranch":
        """The branch of an adapter beside a layer."""
        branch = cls(
            layer.name,
            node,
            [form.fields for form in adapter.forms],
            adapter.weight_shape,
            asdict(layer.operation),
            None if adapter.fingerprint is None else asdict(adapter.fingerprint),
            adapter.rounding_shift is not None,
        )
        if branch.rounding_shift is not None and adapter.rounding_shift is not None:
            shape = branch.rounding_shift.shape
            branch.rounding_shift.copy_(adapter.rounding_shift.view(shape))
        for key, stored in adapter.tensors.items():
            branch.get_parameter(key).data.copy_(stored.dequantize())
            if stored.scale is not None:
                top = 2 ** (stored.bits - 1) - 1
                scale: Any = branch.quantizers[key].scale
                scale.data.copy_(top * stored.scale.reshape(scale.shape))
        return branch.to(layer.weight.device, layer.weight.dtype)

    def forward(self, y: Tensor) -> Tensor:
        """The output with the adapter's share."""
        node, x = getattr(_tapped, "node", None), getattr(_tapped, "x", None)
        _tapped.node = _tapped.x = None
        if node != self.node or x is None:
            raise ModelError(
                f"{self.layer}: its adapter saw no input, for the tap in front of the "
                "layer is missing; call remove_cora(model), then apply_cora again"
            )
        # One by one: exports fold what is added to a layer's own output.
        for index, form in enumerate(self.forms):
            y = y + form.run(self.operation, x, _Quantized(self, form, index))
        if self.in_int8 and self.rounding_shift is not None:
            y = y + self.rounding_shift
        return y

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is stored."""
        values = {n: e.detach() for n, e in self.named_parameters(recurse=False)}
        shift = self.rounding_shift
        rounding = None if shift is None else shift.detach().flatten().float()
        return Adapter.of(self.forms, values, self.fingerprint, rounding)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes; plain values that JSON holds."""
        return {
            "layer": self.layer,
            "node": self.node,
            "terms": [form.fields for form in self.forms],
            "weight_shape": list(self.forms[0].weight_shape),
            "operation": asdict(self.operation),
            "fingerprint": self.fingerprint and asdict(self.fingerprint),
            "rounding": self.rounding_shift is not None,
        }

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "CoRaBranch":
        """Build it from its configuration, factors zero until a state is loaded.

        Configurations of version 0.1, which knew one term, are read as well.
        """
        if "terms" not in state:
            rest = {key: state[key] for key in state.keys() - {"shapes"}}
            fields = {key: rest.pop(key) for key in ("kind", "rank", "bits")}
            state = {**rest, "terms": [earlier_fields(**fields)]}
        return cls(**state)


class _Quantized(Mapping[str, Tensor]):
    """The tensors of one term, quantized where they are used, as tracers see them."""

    def __init__(self, branch: CoRaBranch, form: Form, index: int) -> None:
        self._branch, self._form, self._index = branch, form, index

    def __getitem__(self, name: str) -> Tensor:
        key = flat_name(name, self._index)
        values: Tensor = getattr(self._branch, key)
        quantizers = self._branch.quantizers
        return quantizers[key](values) if key in quantizers else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._form.shapes)

    def __len__(self) -> int:
        return len(self._form.shapes)


class CoRaShift(nn.Module, StatefulModuleInterface):
    """Post-hook on a layer's output: adds a constant a channel, a bias correction.

    Args:
        layer: The layer's name.
        node: NNCF's name of its operation.
        shape: Shape of the constant, [m, 1, …] or [m].
    """

    def __init__(self, layer: str, node: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.node = layer, node
        self.shift = nn.Parameter(torch.zeros(tuple(shape)), requires_grad=False)

    def forward(self, y: Tensor) -> Tensor:
        """The output, shifted."""
        return y + self.shift

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        shape = list(self.shift.shape)
        return {"layer": self.layer, "node": self.node, "shape": shape}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "CoRaShift":
        """Build it from its configuration, zero until a state is loaded."""
        return cls(**state)


OURS = (CoRaTap, CoRaBranch, CoRaShift)


def adapted(model: nn.Module) -> dict[str, CoRaBranch]:
    """The branches of a model by layer name."""
    return {hook.layer: hook for hook in _hooks(model) if isinstance(hook, CoRaBranch)}


def in_int8(model: nn.Module, wanted: bool) -> dict[str, str]:
    """Have a model's adapters add their rounding shifts, or forget them.

    Args:
        model: A copy that is about to be exported.
        wanted: Whether the export rounds merged weights to 8 bits.

    Returns:
        Layer names by the name of the buffer that is added.
    """
    names = {}
    for path, hook in model.named_modules():
        if not isinstance(hook, CoRaBranch) or hook.rounding_shift is None:
            continue
        hook.in_int8 = wanted
        if wanted:
            names[f"{path}.rounding_shift"] = hook.layer
        else:
            hook.rounding_shift = None
    return names


def shifts(model: nn.Module) -> dict[str, CoRaShift]:
    """The bias corrections of a model by layer name."""
    return {hook.layer: hook for hook in _hooks(model) if isinstance(hook, CoRaShift)}


def _hooks(model: nn.Module) -> Iterator[nn.Module]:
    if is_wrapped(model):
        for _, hook in get_hook_storage(model).named_hooks():
            yield hook


def insert_hooks(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    nodes: Mapping[str, str],
    adapters: Mapping[str, Adapter],
    shifts: Mapping[str, Tensor],
) -> None:
    """Put adapters and shifts beside their layers; if anything fails, none is put.

    Args:
        model: The quantized model.
        layers: Its layers by name.
        nodes: NNCF's operations by layer name.
        adapters: Adapters by layer name.
        shifts: Constants [m] that are added to outputs, by layer name.

    Raises:
        ModelError: A layer is missing, does not fit, or already carries an adapter.
    """
    refuse_carriers(adapters.keys() & adapted(model).keys())
    for name in {**adapters, **shifts}:
        layer = layers.get(name)
        weight, groups = (layer.weight, layer.operation.groups) if layer else (None, 1)
        check_fit(name, weight, groups, adapters.get(name), shifts.get(name))
    branches = [CoRaBranch.of(layers[n], nodes[n], a) for n, a in adapters.items()]
    for branch in branches:
        branch.train(model.training)
        hook_input(model, branch.node, CoRaTap(branch.node))
        hook_output(model, branch.node, branch)
    for name, value in shifts.items():
        ones = [1] * layers[name].operation.dimensions
        hook = CoRaShift(name, nodes[name], [len(value), *ones])
        hook.shift.data.copy_(value.view(-1, *ones))
        weight = layers[name].weight
        hook_output(model, hook.node, hook.to(weight.device, weight.dtype))


def remove_hooks(model: nn.Module, types: tuple[type[nn.Module], ...] = OURS) -> None:
    """Take hooks of some types out of a model."""
    for place in hook_places(model):
        for key in list(place):
            hooks: Any = place[key]
            for number in [n for n, h in hooks.items() if isinstance(h, types)]:
                del hooks[number]
            if not hooks:
                del place[key]


def hook_input(
    model: nn.Module, node: str, hook: nn.Module, port: int = 0
) -> RemovableHookHandle:
    """Have a hook see what enters an operation, after every other hook."""
    return get_hook_storage(model).register_pre_function_hook(node, port, hook)


def hook_output(
    model: nn.Module,
    node: str,
    hook: nn.Module,
    behind: tuple[type[nn.Module], ...] = OURS,
) -> RemovableHookHandle:
    """Have a hook see what leaves an operation, before all hooks but `behind`.

    What follows, such as a quantizer, works on what this hook returns. The toolkit's
    hooks keep their numbers, which are names in the state dict.
    """
    handle = get_hook_storage(model).register_post_function_hook(node, 0, hook)
    _, places = hook_places(model)
    hooks: Any = places[handle.key]
    for number, other in list(hooks.items()):
        if other is not hook and not isinstance(other, behind):
            del hooks[number]
            hooks[number] = other
    return handle


def read_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that a model carries, by layer name."""
    return {name: branch.adapter for name, branch in adapted(model).items()}


def _weight_quantizer(shape: Sequence[int], bits: int) -> nn.Module:
    """NNCF's symmetric quantizer, narrow range, a scale a leading channel."""
    quantizer: nn.Module = SymmetricQuantizer(
        PTQuantizerSpec(
            num_bits=bits,
            mode=QuantizationScheme.SYMMETRIC,
            signedness_to_force=True,
            narrow_range=True,
            half_range=False,
            scale_shape=(shape[0], *[1] * (len(shape) - 1)),
            logarithm_scale=False,
        )
    )
    return quantizer.requires_grad_(False)


class _Padding(Operation):
    """An operation whose convolution itself pads, as the layers that NNCF hooks do."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the bias-free operation with `weight` to `x`."""
        if not self.dimensions:
            return F.linear(x, weight)
        if self.transposed:
            return super().__call__(x, weight)
        padding: Any = self.padding
        if padding != "same":
            padding = tuple(before for before, _ in padding)
        output: Tensor = _CONVOLUTION[self.dimensions](
            x, weight, None, self.stride, padding, self.dilation, self.groups
        )
        return output


def _operation(fields: Mapping[str, Any]) -> Operation:
    """An operation from its fields, whose tuples may have become lists."""
    values = dict(fields)
    if values["padding"] != "same":
        values["padding"] = tuple(tuple(sides) for sides in values["padding"])
    for key in ("stride", "dilation", "output_padding"):
        values[key] = tuple(values.get(key, ()))
    return _Padding(**values)
