"""Everything of NNCF that the plugin uses beyond its public interface.

Each name was last seen in NNCF 3.4.0, and its docstring or comment says what needs it.
`tests/integrations/test_nncf_private.py` checks each, so that another version fails
there, by name, and not in the middle of a user's run. Public, and therefore used where
it is needed: `nncf.quantize` and its parameters, algorithms and pipelines with what
they take, quantizers with their ranges and levels, and graphs with what nodes tell.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nncf.common.hardware.config as hardware
import nncf.quantization.algorithms.post_training.algorithm as post_training
import nncf.torch.function_hook.quantization.quantize_model as torch_backend
import torch

# extension.py: the variable that limits the time of a compilation. Seen in 3.4.0.
from nncf.torch.extensions import EXTENSION_LOAD_TIMEOUT_ENV_VAR

# insert.py, layers.py, layer_bits.py, export.py: the hooks of a model, in which
# quantizers stand and adapters are put. Seen in 3.4.0.
from nncf.torch.function_hook import get_hook_storage, is_wrapped
from nncf.torch.function_hook.hook_storage import (
    HookStorage,
    RemovableHookHandle,
    decode_hook_name,
)

# layers.py: the graph that layers are read from, as a model runs. Seen in 3.4.0.
from nncf.torch.function_hook.nncf_graph.nncf_graph_builder import build_nncf_graph

# layers.py, layer_bits.py: which operations have weights, and where. Seen in 3.4.0.
from nncf.torch.graph import operator_metatypes

# insert.py: what a hook must be to survive `get_config`. Seen in 3.4.0.
from nncf.torch.layer_utils import StatefulModuleInterface

# layers.py, layer_bits.py: the parameter that an operation takes. Seen in 3.4.0.
from nncf.torch.model_graph_manager import get_const_data_on_port, get_const_node
from nncf.torch.quantization.extensions import (
    QuantizedFunctionsCPU,
    QuantizedFunctionsCUDA,
)

# insert.py: the settings of a factor's quantizer. Seen in 3.4.0.
from nncf.torch.quantization.layers import BaseWeightsDecompressor, PTQuantizerSpec

# fast.py: the range of an asymmetric quantizer, moved so that zero is a level, and what
# pooling with indices returns, taken apart and put together. Seen in 3.4.0.
from nncf.torch.quantization.quantize_functions import TuneRange
from nncf.torch.quantization.reference import ReferenceQuantizedFunctions
from nncf.torch.return_types import (
    maybe_get_values_from_torch_return_type,
    maybe_wrap_to_torch_return_type,
)
from torch import nn

__all__ = [
    "EXTENSION_LOAD_TIMEOUT_ENV_VAR",
    "PTQuantizerSpec",
    "RemovableHookHandle",
    "StatefulModuleInterface",
    "TuneRange",
    "build_nncf_graph",
    "decode_hook_name",
    "get_const_data_on_port",
    "get_const_node",
    "get_hook_storage",
    "is_wrapped",
    "maybe_get_values_from_torch_return_type",
    "maybe_wrap_to_torch_return_type",
    "operator_metatypes",
]

# nncf.quantize


def wrap_pipeline(wrapper: Callable[[Any], Any]) -> None:
    """Have another function build the pipeline of `nncf.quantize`, for good.

    That is where the flag adds its steps. `create_ptq_pipeline` of 3.4.0, looked up in
    the module of `PostTrainingQuantization` at each call, with keywords.

    Args:
        wrapper: From NNCF's function to the one that is called in its place.
    """
    _wrap(post_training, "create_ptq_pipeline", wrapper)


def wrap_torch_quantize(wrapper: Callable[[Any], Any]) -> None:
    """Have another function stand for `nncf.quantize` on torch models, for good.

    That is where the flag has its dataset checked. `quantize_impl` of 3.4.0, imported
    by `nncf.quantize` at each call and given keywords.

    Args:
        wrapper: From NNCF's function to the one that is called in its place.
    """
    _wrap(torch_backend, "quantize_impl", wrapper)


def _wrap(module: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    now = getattr(module, name)
    # Not on top of its own replacement, where a notebook loads this module again.
    original = getattr(now, "cora_original", now)
    wrapped = functools.wraps(original)(wrapper(original))
    wrapped.cora_original = original  # type: ignore[attr-defined]
    setattr(module, name, wrapped)


# Bit widths


@contextmanager
def more_widths(widths: tuple[int, ...]) -> Iterator[None]:
    """Have NNCF's hardware tables list further bit widths wherever they list 8.

    `allow_bits` does so. `get_hw_setup` of 3.4.0, looked up at each call: a tuple of
    operations, each with what its `weights` and `activations` may be.
    """
    before = hardware.get_hw_setup

    def widened(device: Any) -> Any:
        return tuple(
            dataclasses.replace(
                operation,
                weights=_with(operation.weights, widths),
                activations=_with(operation.activations, widths),
            )
            for operation in before(device)
        )

    hardware.get_hw_setup = widened
    try:
        yield
    finally:
        hardware.get_hw_setup = before


def _with(spaces: Any, widths: tuple[int, ...]) -> Any:
    more = [
        dataclasses.replace(space, bits=width)
        for space in spaces
        if space.bits == 8
        for width in widths
    ]
    return tuple(dict.fromkeys([*spaces, *more]))


def is_width_refused(error: ValueError) -> bool:
    """Whether an error is NNCF's for a bit width that its tables do not list.

    It is raised again with the way out, `allow_bits`. The words are those of 3.4.0,
    which has no class of its own for it.
    """
    return "HW capabilities" in str(error)


def set_bits_of_config(quantizer: Any, bits: int) -> None:
    """Give a quantizer's configuration another bit width, which `num_bits` does not.

    A model is rebuilt from its configuration, single layers' widths included. `_qspec`
    of 3.4.0.
    """
    # A copy, so that the one before is there to be put back.
    quantizer._qspec = copy.copy(quantizer._qspec)
    quantizer._qspec.num_bits = bits


def trace_whole_range(quantizer: Any) -> None:
    """Have a quantizer of a narrow range, -7 to 7, traced with its own levels.

    Else it is traced as from -8, a level that the model itself never takes: in OpenVINO
    IR, weights below -7.5 steps would change by a whole one. `_narrow_range` of 3.4.0.
    """
    quantizer._narrow_range = False


def trace_one_scale(quantizer: Any) -> None:
    """Have a quantizer whose one scale is called one a channel traced as of a tensor.

    So NNCF quantizes depthwise transposed convolutions, and then cannot trace them:
    their weight has several channels along the axis that it takes. `per_channel` and
    `_scale_shape` of 3.4.0.
    """
    if quantizer.per_channel and all(size == 1 for size in quantizer.scale_shape):
        quantizer._scale_shape = (1,)


# Hooks


def decompressors(model: nn.Module) -> int:
    """How many weights `nncf.compress_weights` has replaced by integers.

    Such a model has no float weights; it is told apart from one of `nncf.quantize`.
    `BaseWeightsDecompressor` of 3.4.0.
    """
    hooks = (hook for _, hook in get_hook_storage(model).named_hooks())
    return sum(isinstance(hook, BaseWeightsDecompressor) for hook in hooks)


def hook_places(model: nn.Module) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """The hooks on inputs and those on outputs, each by place and then by number.

    Adapters are put in front of others there, and taken out. A place's key is the `key`
    of a hook's handle; `pre_hooks` and `post_hooks` of 3.4.0.
    """
    storage = get_hook_storage(model)
    return storage.pre_hooks, storage.post_hooks


def hooks_of(model: nn.Module, place: str, node: str, port: int) -> list[nn.Module]:
    """The hooks at one place of a model: quantizers whose bits may be set.

    By operation and port, as `HookStorage._generate_key` of 3.4.0 has it.

    Args:
        model: The wrapped model.
        place: `pre_hooks` or `post_hooks`.
        node: NNCF's name of the operation.
        port: Number of the input, or of the output.
    """
    hooks = getattr(get_hook_storage(model), place)
    key = HookStorage._generate_key(node, port)
    return [*hooks[key].children()] if key in hooks else []


# The C++ extensions, one for the CPU and one for CUDA

CPU = torch.device("cpu")


def _functions(device: torch.device) -> Any:
    """`QuantizedFunctionsCUDA` of 3.4.0 has neither attribute where there is no GPU."""
    return QuantizedFunctionsCUDA if device.type == "cuda" else QuantizedFunctionsCPU


def is_loaded(device: torch.device = CPU) -> bool:
    """Whether a device's extension is in memory: nothing to wait for then.

    `QuantizedFunctionsCPU._loaded_namespace` of 3.4.0, None before.
    """
    return _functions(device)._loaded_namespace is not None


def load(device: torch.device = CPU) -> None:
    """Load an extension, compiling it if need be. `get` of 3.4.0, by a function.

    Raises:
        nncf.InstallationError: CUDA's cannot be compiled here.
    """
    _functions(device).get("Quantize_forward")


def load_reference(device: torch.device) -> None:
    """Use NNCF's own operations in plain torch in an extension's place.

    What NNCF does itself where the CPU's cannot be compiled. `_loaded_namespace` and
    `ReferenceQuantizedFunctions` of 3.4.0.
    """
    _functions(device)._loaded_namespace = ReferenceQuantizedFunctions


def build_folder(device: torch.device = CPU) -> Path:
    """Where an extension is compiled: its lock is awaited there, its file looked for.

    `QuantizedFunctionsCPU._loader.get_build_dir` of 3.4.0.
    """
    return Path(_functions(device)._loader.get_build_dir())
