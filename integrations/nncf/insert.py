"""Puts adapters into NNCF's hooks: a tap on a layer's input, a branch on its output.

They are two modules, for one that is called at both places confuses tracers. Both are
stateful modules in NNCF's sense, hence survive deepcopy, `nncf.torch.get_config` and
`load_from_config(…, allowed_modules=("nncf.*", "cora_plugin.*"))`.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.function_hook import get_hook_storage, is_wrapped
from nncf.torch.function_hook.hook_storage import RemovableHookHandle
from nncf.torch.layer_utils import StatefulModuleInterface
from nncf.torch.quantization.layers import PTQuantizerSpec, SymmetricQuantizer
from torch import Tensor, nn

from cora_plugin.adapters import Adapter, Kind, Operation, QuantizedTensor, quantize
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.adapters.quantized import FLOAT_BITS
from cora_plugin.integrations.host import check_fit, refuse_carriers
from cora_plugin.layer import QuantizedLayer

_tapped = threading.local()
"""Per thread, the input that a tap saw; its layer's branch takes it right after."""

_FUNCTIONS: dict[int, Any] = {0: F.linear, 1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
    """Post-hook on a layer's output: adds the adapter's share, `B ∗ (A ∗ x)`.

    The factors are parameters behind NNCF's own weight quantizers, whose integers are
    the adapter's: exporters store them as they store any quantized weight.

    Args:
        layer: The layer's name.
        node: NNCF's name of its operation.
        kind: Kind of the adapter.
        rank: Its rank.
        weight_shape: Shape of the layer's weight.
        operation: Fields of the layer's `Operation`.
        shapes: Shapes of the factors by name.
        bits: Bit width of the factors, 32 for float.
        fingerprint: Fields of the `Fingerprint` that the adapter was made for.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        layer: str,
        node: str,
        kind: str,
        rank: int,
        weight_shape: Sequence[int],
        operation: Mapping[str, Any],
        shapes: Mapping[str, Sequence[int]],
        bits: int,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.node = layer, node
        self.fingerprint = None
        if fingerprint is not None:
            self.fingerprint = Fingerprint.read(fingerprint)
        self.kind, self.rank, self.bits = Kind(kind), rank, bits
        self.weight_shape = tuple(weight_shape)
        self.operation = _operation(operation)
        self.quantizers = nn.ModuleDict()
        for name, shape in shapes.items():
            values = torch.zeros(tuple(shape))
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            if bits != FLOAT_BITS:
                self.quantizers[name] = _weight_quantizer(
                    shape if name == "a" else (1,), bits
                )

    @classmethod
    def of(cls, layer: QuantizedLayer, node: str, adapter: Adapter) -> "CoRaBranch":
        """The branch of an adapter beside a layer."""
        branch = cls(
            layer.name,
            node,
            str(adapter.kind),
            adapter.rank,
            adapter.weight_shape,
            asdict(layer.operation),
            {key: list(t.values.shape) for key, t in adapter.tensors.items()},
            adapter.a.bits,
            None if adapter.fingerprint is None else asdict(adapter.fingerprint),
        )
        for key, stored in adapter.tensors.items():
            getattr(branch, key).data.copy_(stored.dequantize())
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
            raise CoRaError(
                f"{self.layer}: its adapter saw no input, for the tap in front of the "
                "layer is missing; call remove_cora(model), then apply_cora again"
            )
        if self.kind is Kind.SHARED_BASIS:
            kernel = torch.mm(self._factor("b"), self._factor("a"))  # [m, k]
            return y + self._convolve(x, kernel.reshape(self.weight_shape))
        share = self._convolve(x, self._factor("a"))
        if self.kind is Kind.LOW_RANK:
            dimensions, groups = self.operation.dimensions, self.operation.groups
            extra = {"groups": groups} if dimensions else {}
            share = _FUNCTIONS[dimensions](share, self._factor("b"), **extra)
        return y + share

    def _factor(self, name: str) -> Tensor:
        factor: Tensor = getattr(self, name)
        if name in self.quantizers:
            factor = self.quantizers[name](factor)
        return factor

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation with other filters; the convolution itself pads."""
        operation = self.operation
        if not operation.dimensions:
            return F.linear(x, weight)
        padding: Any = operation.padding
        if padding != "same":
            padding = tuple(before for before, _ in padding)
        convolve = _FUNCTIONS[operation.dimensions]
        output: Tensor = convolve(
            x,
            weight,
            None,
            operation.stride,
            padding,
            operation.dilation,
            operation.groups,
        )
        return output

    @property
    def adapter(self) -> Adapter:
        """The adapter as it is stored."""
        stored: dict[str, QuantizedTensor] = {
            key: quantize(getattr(self, key).detach(), self.bits, key == "a")
            for key in ("a", "b")
            if hasattr(self, key)
        }
        return Adapter(
            self.kind,
            self.rank,
            stored["a"],
            stored.get("b"),
            self.weight_shape,
            self.operation.groups,
            self.fingerprint,
        )

    def get_config(self) -> dict[str, Any]:
        """What `from_config` takes; plain values that JSON holds."""
        return {
            "layer": self.layer,
            "node": self.node,
            "kind": str(self.kind),
            "rank": self.rank,
            "weight_shape": list(self.weight_shape),
            "operation": asdict(self.operation),
            "shapes": {
                key: list(getattr(self, key).shape)
                for key in ("a", "b")
                if hasattr(self, key)
            },
            "bits": self.bits,
            "fingerprint": self.fingerprint and asdict(self.fingerprint),
        }

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "CoRaBranch":
        """Build it from its configuration, factors zero until a state is loaded."""
        return cls(**state)


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


def shifts(model: nn.Module) -> dict[str, CoRaShift]:
    """The bias corrections of a model by layer name."""
    return {hook.layer: hook for hook in _hooks(model) if isinstance(hook, CoRaShift)}


def _hooks(model: nn.Module) -> Iterator[nn.Module]:
    if is_wrapped(model):
        for _, hook in get_hook_storage(model).named_hooks():
            yield hook


def insert_adapters(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    nodes: Mapping[str, str],
    adapters: Mapping[str, Adapter],
) -> None:
    """Put adapters beside their layers; all or, after an error, none.

    Args:
        model: The quantized model.
        layers: Its layers by name.
        nodes: NNCF's operations by layer name.
        adapters: Adapters by layer name.

    Raises:
        CoRaError: A layer is missing, does not fit, or already carries one.
    """
    refuse_carriers(adapters.keys() & adapted(model).keys())
    for name, adapter in adapters.items():
        layer = layers.get(name)
        weight, groups = (layer.weight, layer.operation.groups) if layer else (None, 1)
        check_fit(name, adapter, weight, groups)
    branches = [CoRaBranch.of(layers[n], nodes[n], a) for n, a in adapters.items()]
    for branch in branches:
        branch.train(model.training)
        hook_input(model, branch.node, CoRaTap(branch.node))
        hook_output(model, branch.node, branch)


def insert_shifts(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    nodes: Mapping[str, str],
    values: Mapping[str, Tensor],
) -> None:
    """Add a constant a channel, [m], to the outputs of layers."""
    for name, value in values.items():
        ones = [1] * layers[name].operation.dimensions
        hook = CoRaShift(name, nodes[name], [len(value), *ones])
        hook.shift.data.copy_(value.view(-1, *ones))
        weight = layers[name].weight
        hook_output(model, hook.node, hook.to(weight.device, weight.dtype))


def remove_hooks(model: nn.Module, kinds: tuple[type[nn.Module], ...] = OURS) -> None:
    """Take hooks of some kinds out of a model."""
    storage = get_hook_storage(model)
    for place in (storage.pre_hooks, storage.post_hooks):
        for key in list(place):
            hooks: Any = place[key]
            for number in [n for n, h in hooks.items() if isinstance(h, kinds)]:
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
    """Have a hook see what leaves an operation, before all hooks but some kinds.

    What follows, such as a quantizer, works on what this hook returns. The toolkit's
    hooks keep their numbers, which are names in the state dict.
    """
    storage = get_hook_storage(model)
    handle = storage.register_post_function_hook(node, 0, hook)
    hooks: Any = storage.post_hooks[handle.key]
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


def _operation(fields: Mapping[str, Any]) -> Operation:
    """An operation from its fields, whose tuples may have become lists."""
    values = dict(fields)
    if values["padding"] != "same":
        values["padding"] = tuple(tuple(sides) for sides in values["padding"])
    for key in ("stride", "dilation"):
        values[key] = tuple(values[key])
    return Operation(**values)
