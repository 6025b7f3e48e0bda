"""Reads a model quantized by NNCF: its quantized layers and their two weights."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer
from torch import Tensor, nn

from cora_plugin.adapters import Operation
from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.operation import PLAIN
from cora_plugin.adapters.quantized import FLOAT_BITS
from cora_plugin.host import LEFT_FLOAT
from cora_plugin.integrations.computed import computed as computed_by
from cora_plugin.integrations.host import given_weight
from cora_plugin.integrations.nncf.private import (
    build_nncf_graph,
    decode_hook_name,
    decompressors,
    get_const_node,
    get_hook_storage,
    is_wrapped,
)
from cora_plugin.integrations.nncf.private import operator_metatypes as om
from cora_plugin.integrations.scopes import replaced
from cora_plugin.layer import QuantizedLayer

Reference = nn.Module | Mapping[str, Tensor]
"""The float model that was quantized, or its parameters by name."""

TRANSPOSED = {"conv_transpose1d": 1, "conv_transpose2d": 2, "conv_transpose3d": 3}
"""Those of `DIMENSIONS` whose convolution is transposed."""

DIMENSIONS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3, **TRANSPOSED}
"""Functions whose layers can carry an adapter, and their spatial dimensions."""

_COMPUTED = (
    "its weight is computed as the model runs, not stored; have it stored before "
    "nncf.quantize"
)

WEIGHTED = {*om.CONVOLUTION_METATYPES, *om.MATMUL_METATYPES, om.PTDeformConv2dMetatype}


@dataclass(frozen=True)
class Reading:
    """The quantized layers of a model.

    `nodes` gives NNCF's operation by layer name, `skipped` the reason for each layer
    that cannot carry an adapter, `quantizers` those of weights by layer name, and
    `weights` the float and the quantized weight that each of them took and gave, those
    of skipped layers included, in torch's layout.
    """

    layers: Mapping[str, QuantizedLayer]
    nodes: Mapping[str, str]
    skipped: Mapping[str, str]
    quantizers: Mapping[str, BaseQuantizer]
    weights: Mapping[BaseQuantizer, tuple[Tensor, Tensor]]


def check_model(model: Any) -> None:
    """Refuse what is not a torch model quantized by NNCF, and say what is.

    Raises:
        ModelError: The model is of another backend, or not quantized.
    """
    found = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, nn.Module) or isinstance(model, torch.fx.GraphModule):
        raise ModelError(
            f"the model is a {found}; of NNCF's backends, the adapters support PyTorch "
            "(torch.nn.Module) only, not OpenVINO, ONNX or TorchFX: quantize the "
            "torch.nn.Module and export it afterwards"
        )
    if not is_wrapped(model):
        raise ModelError(
            f"the model ({found}) was not quantized by NNCF; pass what nncf.quantize "
            "returned"
        )
    refuse_sequential(model)
    if compressed := decompressors(model):
        raise ModelError(
            f"{compressed} weights of the model were compressed by "
            "nncf.compress_weights, which keeps no float weights that adapters could "
            "restore; quantize the float model by nncf.quantize, and pass what that "
            "returns"
        )


def refuse_sequential(model: Any) -> None:
    """Refuse a model that would call NNCF's own module as one of its layers.

    Raises:
        ModelError: It is a bare `nn.Sequential` or the like.
    """
    if isinstance(model, nn.Sequential):
        raise ModelError(
            "the model is a bare nn.Sequential, which would call the module that NNCF "
            "adds to it as a layer; wrap it in a module of your own before "
            "nncf.quantize"
        )


class Chain(nn.Module):
    """The layers of an `nn.Sequential` under their names, one after another.

    NNCF adds a module to a model, which a Sequential would call as one of its layers.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        # One layer may be there twice.
        every = layers.named_modules(remove_duplicate=False)
        self._layer_names = [name for name, _ in every if name and "." not in name]
        for name in self._layer_names:
            self.add_module(name, getattr(layers, name))
        self.training = layers.training

    def forward(self, x: Any) -> Any:
        """Call each layer with what the one before it gave."""
        for name in self._layer_names:
            x = getattr(self, name)(x)
        return x


def chained(model: nn.Module) -> nn.Module:
    """The model, or the same layers in a `Chain` where it is a bare `nn.Sequential`.

    Raises:
        ModelError: It is a Sequential with a way of its own to call its layers.
    """
    if (
        isinstance(model, nn.Sequential)
        and type(model).forward is nn.Sequential.forward
    ):
        return Chain(model)
    refuse_sequential(model)
    return model


@torch.no_grad()
def read_layers(
    model: nn.Module, example_input: Any, reference: Reference | None = None
) -> Reading:
    """Read every quantized layer of a model in evaluation mode.

    Args:
        model: The quantized model.
        example_input: What NNCF traces it with: a tensor, a tuple of arguments or a
            mapping of keywords.
        reference: Where the float weights are, if not in the model.

    Raises:
        ModelError: The reference does not fit the model.
    """
    hooks = quantizer_hooks(model)
    seen: dict[BaseQuantizer, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for quantizer in set(hooks.values()):
            stack.enter_context(
                replaced(quantizer, "forward", _recording(quantizer, seen))
            )
        graph = build_nncf_graph(model, example_input)
    given = None if reference is None else parameters_of(reference)
    nodes = [node for node in graph.topological_sort() if node.metatype in WEIGHTED]
    found: dict[str, tuple[Any, BaseQuantizer, int]] = {}
    computed: list[str] = []
    floats: list[str] = []
    for node in nodes:
        for port in node.metatype.weight_port_ids:
            quantizer = hooks.get((node.node_name, port))
            stored = port in node.layer_attributes.constant_port_ids
            if quantizer is None or quantizer not in seen:
                if node.node_type in DIMENSIONS:
                    (floats if stored else computed).append(node.node_name)
                continue
            if stored:
                found[node.node_name] = (node, quantizer, port)
            elif node.node_type in DIMENSIONS:
                computed.append(node.node_name)
    names = layer_names(model, [*found, *computed, *floats])
    layers: dict[str, QuantizedLayer] = {}
    skipped = {names[node]: _computed(model, names[node]) for node in computed}
    skipped |= {names[node]: LEFT_FLOAT for node in floats}
    for node in filter(beside_layers, graph.get_all_nodes()):
        for port in node.layer_attributes.constant_port_ids:
            if hooks.get((node.node_name, port)) in seen:
                skipped[_path(node.node_name)] = f"{node.node_type} is not supported"
    for node_name, (node, quantizer, port) in found.items():
        name = names[node_name]
        weight, dequantized = seen[quantizer]
        reason = _obstacle(node, quantizer, weight, dequantized)
        if reason is not None:
            skipped[name] = reason
            continue
        if given is not None:
            parameter = get_const_node(node, port, graph).layer_attributes.name
            weight = given_weight(
                name,
                given.get(parameter),
                dequantized,
                f"pass the float model that was quantized, for its {parameter}; or "
                "none where SmoothQuant moved weights: NNCF keeps the float ones in "
                "the quantized model",
            )
            seen[quantizer] = (weight, dequantized)
        operation = operation_of(node)
        layers[name] = QuantizedLayer(
            name,
            operation.layout(weight),
            operation.layout(dequantized),
            operation,
            float(quantizer.num_bits),
            _scale_bits(quantizer),
        )
    constant = {quantizer for _, quantizer, _ in found.values()}
    return Reading(
        layers,
        {names[node_name]: node_name for node_name in found},
        skipped,
        {names[node_name]: quantizer for node_name, (_, quantizer, _) in found.items()},
        {quantizer: seen[quantizer] for quantizer in constant},
    )


def _computed(model: nn.Module, name: str) -> str:
    """Why a layer with a computed weight is left alone, and the way out."""
    layer = dict(model.named_modules()).get(name)
    how = None if layer is None else computed_by(layer)
    return _COMPUTED if how is None else how.reason(name, "nncf.quantize")


def beside_layers(node: Any) -> bool:
    """Whether a node has stored weights and is no layer: an embedding or a norm."""
    stored = getattr(node.layer_attributes, "constant_port_ids", None)
    return bool(stored) and node.metatype not in WEIGHTED


def parameters_of(reference: Reference) -> Mapping[str, Tensor]:
    """The parameters of a reference by name."""
    if isinstance(reference, nn.Module):
        return {name: p.detach() for name, p in reference.named_parameters()}
    return reference


def operation_of(node: Any) -> Operation:
    """The convolution or linear operation of a node of NNCF's graph."""
    dimensions = DIMENSIONS[node.node_type]
    if not dimensions:
        return Operation()
    arguments = _arguments(node)
    padding = arguments.get("padding", 0)
    sides: Any = "same"
    if padding == "valid":
        sides = ((0, 0),) * dimensions
    elif padding != "same":
        sides = tuple((side, side) for side in _each(padding, dimensions))
    return Operation(
        dimensions,
        _each(arguments.get("stride", 1), dimensions),
        sides,
        "zeros",
        _each(arguments.get("dilation", 1), dimensions),
        arguments.get("groups", 1),
        *_beyond(node, arguments),
    )


def _beyond(node: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an operation has where it is a transposed convolution."""
    if node.node_type not in TRANSPOSED:
        return ()
    more = arguments.get("output_padding", 0)
    return True, _each(more, TRANSPOSED[node.node_type])


def _arguments(node: Any) -> dict[str, Any]:
    """The arguments of a call of torch.nn.functional.conv…, by name."""
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if node.node_type in TRANSPOSED:
        names[5:] = "output_padding", "groups", "dilation"
    attributes = node.layer_attributes
    given = dict(zip(names, attributes.op_args, strict=False))
    return {**given, **attributes.op_kwargs}


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dimensions
    sizes = tuple(value)
    return sizes * dimensions if len(sizes) == 1 else sizes


def quantizer_hooks(model: nn.Module) -> dict[tuple[str, int], BaseQuantizer]:
    """The quantizers in front of operations, by operation and port."""
    found = {}
    storage = get_hook_storage(model)
    for hook_name, hook in storage.named_hooks(remove_duplicate=False):
        place, node, port = decode_hook_name(hook_name)
        if place == "pre_hooks" and isinstance(hook, BaseQuantizer):
            found[node, port] = hook
    return found


def _recording(quantizer: Any, seen: dict[Any, tuple[Tensor, Tensor]]) -> Any:
    forward = quantizer.forward

    def record(x: Any) -> Any:
        y = forward(x)
        if isinstance(x, Tensor):
            # A quantizer that is disabled hands on the parameter itself.
            seen[quantizer] = (x.detach(), y.detach())
        return y

    return record


def layer_names(model: nn.Module, nodes: list[str]) -> dict[str, str]:
    """A module's path where one plain layer makes one call; else NNCF's own name."""
    modules = dict(model.named_modules())
    paths = {node: _path(node) for node in nodes}
    calls = list(paths.values())
    return {
        node: path
        if calls.count(path) == 1 and isinstance(modules.get(path), PLAIN)
        else node
        for node, path in paths.items()
    }


def _path(node: str) -> str:
    """The path of the module that makes a call."""
    return node.rsplit("/", 2)[0].replace("/", ".")


def _obstacle(
    node: Any, quantizer: BaseQuantizer, weight: Tensor, dequantized: Tensor
) -> str | None:
    """Why a quantized layer cannot carry an adapter, or None."""
    if node.node_type not in DIMENSIONS:
        return f"{node.node_type} is not supported"
    if not quantizer.is_enabled_quantization():
        return "its weight is not quantized"
    dimensions = DIMENSIONS[node.node_type]
    if weight.ndim != dimensions + 2 or weight.shape != dequantized.shape:
        return f"its weight has shape {list(weight.shape)}"
    return None


def _scale_bits(quantizer: Any) -> int:
    scales = 1
    for size in quantizer.scale_shape:
        scales *= size
    bits = FLOAT_BITS * scales
    if isinstance(quantizer, AsymmetricQuantizer):
        bits += quantizer.num_bits * scales
    return bits
