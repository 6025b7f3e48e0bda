"""Everything of Brevitas that the plugin uses beyond its public interface.

Each name was last seen in Brevitas 0.13.4, and its docstring says what needs it.
`tests/integrations/test_brevitas_private.py` checks each, so that another version fails
there, by name, and not in the middle of a user's run. Public, and therefore used where
it is needed: the layers of `brevitas.nn` with their quantizers' `disable_quant` and
`is_quant_enabled`, quantizers to inherit from, QuantTensors, the modes and functions of
`brevitas.graph`, the exporters, and the `apply_…` functions of the ImageNet example.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from brevitas.core.function_wrapper.learned_round import LearnedRoundSte
from brevitas.core.quant import IntQuant, RescalingIntQuant
from brevitas.core.stats import MSE
from brevitas.fx import GraphModule
from brevitas.graph.calibrate import quantization_status_manager
from brevitas.graph.gpxq import gpxq_mode
from brevitas.graph.magr import magr_mode
from brevitas.inject.enum import FloatToIntImplType
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from brevitas.proxy.parameter_quant import WeightQuantProxyFromInjectorBase
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.proxy.runtime_quant import ActQuantProxyFromInjectorBase
from torch import Tensor, fx, nn

__all__ = [
    "ActQuantProxyFromInjectorBase",
    "QuantWeightBiasInputOutputLayer",
    "quantization_status_manager",
]

# Layers

INNER_FORWARD = "inner_forward_impl"
"""`(input, quantized weight, quantized bias) -> output` of a layer, behind its input's
quantizer and before its output's: where adapters add their share (a subclass overrides
it), inputs and outputs are observed, and shifts are tried. Seen in 0.13.4."""


def kept_weight(layer: Any) -> Tensor | None:
    """The float weight that GPTQ and the like keep of a layer, if they do.

    The residual that adapters give back is taken from it. `weight_orig` of 0.13.4. The
    pruning of torch has a parameter of that name, the weights before they were pruned,
    beside a mask: they are none of the network's.
    """
    weight: Tensor | None = getattr(layer, "weight_orig", None)
    return None if is_pruned(layer) else weight


def is_pruned(layer: Any) -> bool:
    """Whether `torch.nn.utils.prune` computes the layer's weight as it runs."""
    return hasattr(layer, "weight_orig") and hasattr(layer, "weight_mask")


def with_value(result: Any, value: Tensor) -> Any:
    """A layer's output with another value, and the scale that it had.

    Layers behind it may need that scale: a bias in its steps, a truncation. In 0.13.4
    QuantTensors are named tuples with a `value`.
    """
    return value if isinstance(result, Tensor) else result._replace(value=value)


def renew_kept_weight(layer: Any) -> None:
    """Keep a layer's weight as it is now in place of that one.

    It was trained, and is the float weight now. `weight_orig` of 0.13.4, a buffer.
    """
    kept = kept_weight(layer)
    if kept is not None:
        kept.copy_(layer.weight.detach())


def is_same_padded(layer: Any) -> bool:
    """Whether a strided convolution pads as TensorFlow's "same" does.

    Factors have to slide as their layer does. `is_same_padded_strided` of 0.13.4.
    """
    return bool(layer.is_same_padded_strided)


def output_left_off(layer: Any) -> bool:
    """Whether a layer bears the trace of `bias_correction_mode`.

    It switches a layer's output quantizer off for its forward passes, and on again only
    where there is one: so adapters after bias correction are refused. Seen in 0.13.4.
    """
    before, behind = layer.input_quant, layer.output_quant
    return bool(behind.disable_quant and not before.disable_quant)


# Weight quantizers


def injector(proxy: Any) -> Any:
    """What a proxy builds its quantizer from: `quant_injector` of 0.13.4.

    Learned round puts another one in, which is taken back where it is refused.
    """
    return proxy.quant_injector


def set_injector(proxy: Any, given: Any) -> None:
    """Put an injector back; the proxy's quantizer stays as it is. Seen in 0.13.4."""
    proxy.quant_injector = given


def begins_learned_round(proxy: Any) -> bool:
    """Whether a proxy is about to build a quantizer of learned rounding, its first.

    `float_to_int_impl_type` of the injector says so, and a `LearnedRoundSte` among the
    modules that it has done so already. Seen in 0.13.4.
    """
    name, settings = "float_to_int_impl_type", proxy.quant_injector
    # Not getattr: what A2Q's settings lack is an error of their own kind.
    rounding = getattr(settings, name) if name in settings else None
    return rounding == FloatToIntImplType.LEARNED_ROUND and not learns_rounding(proxy)


def learns_rounding(proxy: Any) -> bool:
    """Whether a proxy rounds up or down as was learned: `LearnedRoundSte` of 0.13.4."""
    return any(isinstance(module, LearnedRoundSte) for module in proxy.modules())


def before_building(proxy: Any, check: Callable[[Any], None]) -> None:
    """Have a check called with a proxy before it builds its quantizer anew.

    Where learned round begins, it is refused so. `init_tensor_quant` of 0.13.4.
    """

    def init_tensor_quant(proxy: Any, *args: Any, **kwargs: Any) -> None:
        check(proxy)
        type(proxy).init_tensor_quant(proxy, *args, **kwargs)

    # A bound method, since deepcopy binds it to the copied proxy.
    proxy.init_tensor_quant = MethodType(init_tensor_quant, proxy)


def build_unchecked(proxy: Any) -> None:
    """Undo `before_building`."""
    vars(proxy).pop("init_tensor_quant", None)


def lacks_input(layer: Any) -> bool:
    """Whether a weight quantizer needs its layer's input, and has not seen any.

    That of A2Q goes by bit width and sign of the input. `requires_quant_input` of
    0.13.4, and `_cached_act`, where the proxy keeps what it has seen.
    """
    proxy = layer.weight_quant
    if not (proxy.is_quant_enabled and getattr(proxy, "requires_quant_input", False)):
        return False
    return getattr(proxy, "_cached_act", None) is None


def hand_on_input(proxy: Any, other: Any) -> None:
    """Give a weight quantizer what another one has seen of its layer's input."""
    if getattr(proxy, "requires_quant_input", False):
        other._cached_act = proxy._cached_act


def needs_scale(error: Exception) -> bool:
    """Whether an error is that of a layer which needs a QuantTensor and has none.

    The words are those of 0.13.4, which has no class of its own for it.
    """
    words = "Input scale required", "not correctly configured"
    return any(each in str(error) for each in words)


@contextmanager
def keeping_inputs(layers: list[Any]) -> Iterator[None]:
    """Within it weight quantizers keep what they see of their layer's input.

    `cache_inference_quant_act` of 0.13.4; scale, zero point and bit width alone.
    """
    proxies = [layer.weight_quant for layer in layers]
    before = [proxy.cache_inference_quant_act for proxy in proxies]
    for proxy in proxies:
        proxy.cache_inference_quant_act = True
    try:
        yield
    finally:
        for proxy, value in zip(proxies, before, strict=True):
            proxy.cache_inference_quant_act = value


# GPTQ, GPFQ, Qronos, MagR


def before_gpxq(check: Callable[[nn.Module, str], None]) -> None:
    """Have a check called with a model and a method's name wherever one begins on it.

    For good, and for every mode that inherits `gpxq_mode.__enter__`. What the check
    raises leaves the model as it was before the mode was made. Seen in 0.13.4.
    """
    # Not on top of its own replacement, where a notebook loads this module again.
    enter = getattr(gpxq_mode.__enter__, "cora_original", gpxq_mode.__enter__)

    @functools.wraps(enter)
    def checked(mode: Any) -> Any:
        try:
            check(mode.model, method_of(mode))
        except BaseException:
            give_forward_back(mode)
            raise
        return enter(mode)

    checked.cora_original = enter  # type: ignore[attr-defined]
    gpxq_mode.__enter__ = checked


def method_of(mode: Any) -> str:
    """The name of the method that a mode applies, for the error that refuses it.

    `gptq_class` of `gptq_mode`, and `algorithm_impl` of `gpfq_mode`, for Qronos a
    `partial`. Seen in 0.13.4.
    """
    if isinstance(mode, magr_mode):
        return "MagR"
    method = getattr(mode, "gptq_class", None) or getattr(mode, "algorithm_impl", mode)
    if isinstance(method, functools.partial):
        method = method.func
    return str(getattr(method, "__name__", type(mode).__name__))


def give_forward_back(mode: Any) -> None:
    """Undo what the constructor of a mode does to its model: it replaces `forward`.

    `__exit__` would also switch quantizers on that were never switched off, and leave
    the class's method on the model. `orig_forward` of 0.13.4, and its two places.
    """
    model, forward = mode.model, mode.orig_forward
    own = getattr(forward, "__self__", None) is model
    if isinstance(model, GraphModule | fx.GraphModule):
        type(model).forward = forward.__func__ if own else forward
        return
    del model.forward
    if not own or forward.__func__ is not type(model).forward:
        model.forward = forward


# Activation quantizers


def integer_activations(model: nn.Module) -> Iterator[RescalingIntQuant]:
    """The quantizers of a model's activations that round to integers at a scale.

    They are replaced by faster ones while CoRa runs the model. Exactly these types: a
    subclass may round or clamp in its own way. A quantizer answers with value, scale,
    zero point and bit width. `fused_activation_quant_proxy` of 0.13.4.
    """
    for proxy in model.modules():
        if not isinstance(proxy, ActQuantProxyFromInjectorBase):
            continue
        if not proxy.is_quant_enabled or proxy.fused_activation_quant_proxy is None:
            continue
        quantizer = proxy.fused_activation_quant_proxy.tensor_quant
        if type(quantizer) is not RescalingIntQuant:
            continue
        if type(quantizer.int_quant) is IntQuant:
            yield quantizer


def integer_range(quantizer: RescalingIntQuant, bits: Tensor) -> tuple[float, float]:
    """The least and the greatest integer: `min_int` and `max_int` of 0.13.4."""
    inner = quantizer.int_quant
    return float(inner.min_int(bits)), float(inner.max_int(bits))


def holds_scale(proxy: Any) -> bool:
    """Whether a weight's scale is a value, not computed from the weight; or unknown.

    Only then do codes change because weights do. A `scaling_impl` that is computed anew
    with every pass has no `value`, parameter or constant, in 0.13.4.
    """
    scaling = getattr(proxy.tensor_quant, "scaling_impl", None)
    return scaling is None or hasattr(scaling, "value")


def with_held_scale(proxy: Any, layer: Any) -> Any:
    """Another proxy of a layer, whose scale is a parameter that begins as it stands.

    `scaling_impl_type` of 0.13.4, as the recipes for training set it.
    """
    given = proxy.quant_injector.let(scaling_impl_type="parameter_from_stats")
    return type(proxy)(layer, given)


def integer_weight(proxy: Any) -> RescalingIntQuant | None:
    """A proxy's quantizer, if it rounds to the nearest integer at a scale.

    As `integer_activations` does. `tensor_quant` of 0.13.4.
    """
    quantizer = proxy.tensor_quant
    if type(quantizer) is not RescalingIntQuant:
        return None
    if type(quantizer.int_quant) is not IntQuant:
        return None
    return quantizer if proxy.rounding_mode.upper() == "ROUND" else None


def integer_steps(proxy: Any, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and bit width of a proxy that `integer_weight` knows.

    The first lines of the `forward` of 0.13.4: codes of weights take no other.
    """
    quantizer = proxy.tensor_quant
    bits = quantizer.msb_clamp_bit_width_impl()
    scale = quantizer.scaling_impl(weight, quantizer.int_scaling_impl(bits))
    return scale, quantizer.zero_point_impl(weight, scale, bits), bits


def range_searches(quantizer: RescalingIntQuant) -> Iterator[MSE]:
    """What looks for the scale and the zero point of least squared error: `MSE`.

    Those of a range for the whole tensor, none of another method. Seen in 0.13.4.
    """
    for search in quantizer.modules():
        if type(search) is MSE and search.stats_reduce_dim is None:
            yield search


@contextmanager
def measured_by(
    search: MSE,
    quantizer: RescalingIntQuant,
    error: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Within it a search measures its candidates by another function than Brevitas'.

    It stands in for `evaluate_loss`, which sets the candidate and runs the quantizer:
    here that only tells scale, zero point and bit width. Of `_mse_search` it spares the
    search where there is one candidate, as for the zero point of activations that are
    never negative. Seen in 0.13.4.

    Args:
        search: One of `range_searches`.
        quantizer: The quantizer that it is a part of, which alone has seen its input.
        error: From an input, a scale, a zero point and a bit width to a squared error.
    """
    whole = search._mse_search

    def evaluate_loss(x: Tensor, candidate: Tensor) -> Tensor:
        search.internal_candidate = candidate
        _, scale, zero_point, bits = quantizer(x)
        return error(x, scale, zero_point, bits)

    def mse_search(xl: Tensor, xr: Tensor, loss_fn: Any, num_iter: int) -> Any:
        search.set_local_loss_mode(True)  # The candidate is taken for what is sought.
        search.set_observer_mode(True)  # Nothing is rounded.
        try:
            if torch.equal(xl, xr):
                return xl, loss_fn(xl)
            return whole(xl, xr, loss_fn, num_iter)
        finally:
            search.restore_observer_mode()
            search.set_local_loss_mode(False)

    search.evaluate_loss, search._mse_search = evaluate_loss, mse_search
    try:
        yield
    finally:
        del search.evaluate_loss, search._mse_search


# Exports


def onnx_qcdq_manager() -> Any:
    """The class behind `export_onnx_qcdq`, asked what it cannot write (0.13.4)."""
    from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager

    return StdQCDQONNXManager


def qonnx_manager() -> Any:
    """The class behind `export_qonnx`, for the same (0.13.4)."""
    from brevitas.export.onnx.qonnx.manager import QONNXManager

    return QONNXManager


def torch_qcdq_manager() -> Any:
    """The class behind `export_torch_qcdq`, for the same (0.13.4)."""
    from brevitas.export.torch.qcdq.manager import TorchQCDQManager

    return TorchQCDQManager


def quantizers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The enabled quantizers of a model, by name: `QuantProxyFromInjector` of 0.13.4.

    An exporter that fails is asked about each.
    """
    for name, proxy in model.named_modules():
        if isinstance(proxy, QuantProxyFromInjector) and proxy.is_quant_enabled:
            yield name, proxy


def unwritable(manager: Any, proxy: Any) -> str | None:
    """Why an exporter cannot write a quantizer, None where it can.

    It asks the handler that the exporter would use; `is_groupwise`,
    `handler_from_module` and `prepare_for_export` of 0.13.4.
    """
    if proxy.is_groupwise:
        return "it has a scale for every few values (per group)"
    handler = manager.handler_from_module(proxy, no_inheritance=True)
    if handler is None:
        return f"no {type(proxy).__name__}"
    try:
        handler().prepare_for_export(proxy)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


def rounds_in_its_own_way(model: nn.Module) -> bool:
    """Whether a weight is rounded otherwise than to the nearest integer.

    QONNX stores float weights and rounds them so; others are rounded before.
    `rounding_mode` of 0.13.4.
    """
    return any(
        isinstance(proxy, WeightQuantProxyFromInjectorBase)
        and proxy.rounding_mode.upper() != "ROUND"
        for _, proxy in quantizers(model)
    )


# The ImageNet example

SCRIPT_HELPERS = (
    "apply_bias_correction",
    "apply_learned_round",
    "calibrate",
    "export_onnx_qcdq",
    "export_torch_qcdq",
    "generate_dataloader",
    "get_torchvision_model",
    "quant_inference_mode",
    "quantize_model",
)
"""Functions that the script's `quantize_ptq_imagenet` calls by these names of its
module: there adapters come in. Seen in 0.13.4."""


def ptq_script() -> ModuleType:
    """The script `brevitas_ptq_imagenet_val`, which `cora-plugin brevitas-ptq` runs.

    Its `create_args_parser`, `validate_args`, `quantize_ptq_imagenet` and helpers, seen
    in 0.13.4. Imported late: it silences warnings, and needs more packages.
    """
    from brevitas_examples.imagenet_classification.ptq import ptq_evaluate

    return ptq_evaluate  # type: ignore[no-any-return]


def missing_helpers(function: Any) -> set[str]:
    """The helpers that another version's function does not call."""
    return {*SCRIPT_HELPERS} - {*function.__code__.co_names}


def with_helpers(function: Any, helpers: Any, around: Callable[[str, Any], Any]) -> Any:
    """A copy of the script's function that calls an object's methods as its helpers.

    Args:
        function: The script's.
        helpers: Has the methods.
        around: From the name of a function that the script calls, and the function, to
            the one that it calls instead.
    """
    own = {name: getattr(helpers, name) for name in SCRIPT_HELPERS}
    names = {**function.__globals__, **own}
    called = {n: names[n] for n in function.__code__.co_names if n in names}
    steps = {n: f for n, f in called.items() if n in own or isinstance(f, FunctionType)}
    names |= {name: around(name, step) for name, step in steps.items()}
    return FunctionType(
        function.__code__, names, function.__name__, function.__defaults__
    )


def layer_map(**settings: Any) -> Any:
    """What the example's recipe makes of each kind of layer, for `layerwise_quantize`.

    The second map of `create_quant_maps` of 0.13.4; the stock recipe quantizes by it.
    """
    from brevitas_examples.imagenet_classification.ptq.ptq_common import (
        create_quant_maps,
    )

    return create_quant_maps(**settings)[1]
