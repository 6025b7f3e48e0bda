"""What the plugin uses of Brevitas beyond its public interface is as it was.

A failure says which name has changed and what depends on it.
"""

import copy
import inspect
from functools import partial

import brevitas.nn as qnn
import pytest
import torch
from brevitas.quant import (
    Int8ActPerTensorFloat,
    Int8WeightPerTensorFloat,
    Uint8ActPerTensorFloat,
)
from privates import Privates
from torch import nn

PRIVATES = Privates("brevitas", "0.13.4")
needs = PRIVATES.needs

SCRIPT = "brevitas_examples.imagenet_classification.ptq"
NAMES = {
    (
        "brevitas.core.function_wrapper.learned_round",
        "LearnedRoundSte",
    ): "refusing learned round beside adapters",
    ("brevitas.core.quant", "IntQuant"): "quantizing activations faster",
    ("brevitas.core.quant", "RescalingIntQuant"): "quantizing activations faster",
    ("brevitas.core.stats", "MSE"): "finding activation ranges faster",
    ("brevitas.fx", "GraphModule"): "leaving a model as it was where GPTQ is refused",
    (
        "brevitas.graph.calibrate",
        "quantization_status_manager",
    ): "the float model, and other weights in the quantized one",
    ("brevitas.graph.gpxq", "gpxq_mode"): "refusing GPTQ and the like beside adapters",
    ("brevitas.graph.magr", "magr_mode"): "refusing MagR beside adapters, by its name",
    (
        "brevitas.inject.enum",
        "FloatToIntImplType",
    ): "refusing learned round beside adapters",
    (
        "brevitas.nn.quant_layer",
        "QuantWeightBiasInputOutputLayer",
    ): "finding quantized layers",
    (
        "brevitas.proxy.parameter_quant",
        "WeightQuantProxyFromInjectorBase",
    ): "exporting QONNX of weights that round in their own way",
    (
        "brevitas.proxy.quant_proxy",
        "QuantProxyFromInjector",
    ): "saying which layer an exporter cannot write",
    (
        "brevitas.proxy.runtime_quant",
        "ActQuantProxyFromInjectorBase",
    ): "quantizing activations faster",
    (
        "brevitas.export.onnx.standard.qcdq.manager",
        "StdQCDQONNXManager",
    ): "saying which layer export_onnx_qcdq cannot write",
    (
        "brevitas.export.onnx.qonnx.manager",
        "QONNXManager",
    ): "saying which layer export_qonnx cannot write",
    (
        "brevitas.export.torch.qcdq.manager",
        "TorchQCDQManager",
    ): "saying which layer export_torch_qcdq cannot write",
    (SCRIPT, "ptq_evaluate"): "cora-plugin brevitas-ptq",
    (f"{SCRIPT}.ptq_common", "create_quant_maps"): "the stock recipe, quantize_ptq",
}


@pytest.mark.parametrize(("place", "feature"), NAMES.items())
def test_the_name_exists(place, feature):
    if place == (SCRIPT, "ptq_evaluate"):  # its import changes global settings
        from cora_plugin.integrations.brevitas.imagenet import stock_script

        with needs(".".join(place), feature), stock_script():
            return
    PRIVATES.exists(*place, feature)


def test_every_name_is_checked():
    assert PRIVATES.imported() == {*NAMES}


def test_they_are_reached_in_one_place():
    attributes = {
        "algorithm_impl",
        "evaluate_loss",
        "fused_activation_quant_proxy",
        "gptq_class",
        "handler_from_module",
        "init_tensor_quant",
        "int_quant",
        "internal_candidate",
        "is_groupwise",
        "is_same_padded_strided",
        "orig_forward",
        "prepare_for_export",
        "quant_injector",
        "rounding_mode",
        "tensor_quant",
        "weight_orig",
    }
    found = PRIVATES.reached_elsewhere(attributes)
    # argparse's own.
    assert [each for each in found if not each.endswith("._actions")] == []


@pytest.fixture(scope="module")
def private():
    with needs("what private.py imports", "the whole host"):
        from cora_plugin.integrations.brevitas import private

        return private


class Net(nn.Module):
    def __init__(self, rounding="ROUND"):
        super().__init__()
        weight = Int8WeightPerTensorFloat.let(float_to_int_impl_type=rounding)
        given = {"weight_quant": weight, "input_quant": Int8ActPerTensorFloat}
        self.conv = qnn.QuantConv2d(3, 4, 3, stride=2, padding=1, **given)
        self.relu = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat)
        self.head = qnn.QuantLinear(4, 2, bias=True, weight_quant=weight)

    def forward(self, x):
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net(torch.randn(8, 3, 8, 8))
    return net.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(8, 3, 8, 8)


def test_layers_run_through_their_inner_forward(private, net, images):
    feature = "adapters, observing layers, trying shifts"
    with needs(f"QuantConv2d.{private.INNER_FORWARD}", feature), torch.no_grad():
        inner, seen = getattr(net.conv, private.INNER_FORWARD), []

        def watching(x, weight, bias):
            seen.append((x, weight))
            return inner(x, weight, bias) + 1

        expected = net.conv(images)
        setattr(net.conv, private.INNER_FORWARD, watching)
        assert torch.equal(net.conv(images), expected + 1)
        ((x, weight),) = seen
        assert torch.equal(x.value, net.conv.input_quant(images).value)
        assert torch.equal(weight.value, net.conv.quant_weight().value)
        for kind in (
            qnn.QuantLinear,
            qnn.QuantConv1d,
            qnn.QuantConv2d,
            qnn.QuantConv3d,
        ):
            signature = inspect.signature(getattr(kind, private.INNER_FORWARD))
            names = ["self", "x", "quant_weight", "quant_bias"]
            assert list(signature.parameters) == names, kind


def test_status_manager_switches_quantizers_off_and_on(private, net, images):
    with needs("quantization_status_manager", "the float model"), torch.no_grad():
        before = net(images)
        scope = private.quantization_status_manager(
            net,
            disable_act_quant=True,
            disable_weight_quant=True,
            disable_bias_quant=True,
            is_training=False,
        )
        with scope:
            conv, head = net.conv, net.head
            x = nn.functional.conv2d(images, conv.weight, conv.bias, 2, 1).relu()
            y = nn.functional.linear(x.mean((2, 3)), head.weight, head.bias)
            torch.testing.assert_close(net(images), y)
        assert torch.equal(net(images), before)


def test_gptq_keeps_the_float_weight(private, net):
    from brevitas.graph.gptq import gptq_mode

    with needs("the buffer weight_orig", "adapters after GPTQ and the like"):
        assert private.kept_weight(net.conv) is None
        with torch.no_grad(), gptq_mode(net, create_weight_orig=True):
            kept = private.kept_weight(net.conv)
            assert torch.equal(kept, net.conv.weight) and kept is not net.conv.weight


def test_a_trained_weight_is_kept_in_its_place(private, net):
    with needs("the buffer weight_orig", "training after GPTQ"):
        net.conv.register_buffer("weight_orig", torch.zeros_like(net.conv.weight))
        private.renew_kept_weight(net.conv)
        assert torch.equal(net.conv.weight_orig, net.conv.weight)


def test_codes_follow_from_scale_zero_point_and_bit_width(private):
    what = "tensor_quant of weights, and the parts of a RescalingIntQuant"
    with needs(what, "counting transitions of weights"), torch.no_grad():
        layer = qnn.QuantLinear(8, 4, weight_quant=Int8WeightPerTensorFloat)
        quantizer = private.integer_weight(layer.weight_quant)
        scale, zero_point, bits = private.integer_steps(
            layer.weight_quant, layer.weight
        )
        low, high = private.integer_range(quantizer, bits)
        codes = (layer.weight / scale + zero_point).round().clamp(low, high)
        assert torch.equal(codes, layer.quant_weight().int().float())
        assert not private.learns_rounding(layer.weight_quant)


def test_a_scale_can_become_a_value(private):
    what = "scaling_impl of weights, and scaling_impl_type of their injector"
    with needs(what, "training under transition rates"), torch.no_grad():
        layer = qnn.QuantLinear(8, 4, weight_quant=Int8WeightPerTensorFloat)
        proxy = layer.weight_quant
        assert not private.holds_scale(proxy)
        held = private.with_held_scale(proxy, layer)
        assert private.holds_scale(held)
        assert torch.allclose(held(layer.weight).value, proxy(layer.weight).value)


def test_same_padding_is_told(private, net):
    with needs("is_same_padded_strided", "adapters of convolutions padded as 'same'"):
        assert not private.is_same_padded(net.conv)
        strided = qnn.QuantConv2d(3, 4, 3, stride=2, padding="same")
        assert private.is_same_padded(strided)


def test_bias_correction_leaves_a_trace(private, net, images):
    from brevitas.graph.calibrate import bias_correction_mode

    what = "what bias_correction_mode does to output_quant.disable_quant"
    with needs(what, "refusing adapters after bias correction"), torch.no_grad():
        assert not private.output_left_off(net.conv)
        with bias_correction_mode(net):
            net(images)
        assert private.output_left_off(net.conv)


def begin_learned_round(net):
    from brevitas.inject.enum import LearnedRoundImplType
    from brevitas_examples.common.learned_round.learned_round_method import (
        insert_learned_round_quantizers,
    )

    insert_learned_round_quantizers(net, LearnedRoundImplType.HARD_SIGMOID)


def test_learned_round_builds_quantizers_anew(private, net):
    what = "init_tensor_quant and quant_injector of weight quantizers"
    with needs(what, "refusing learned round beside adapters"):
        begun = []

        def check(proxy):
            if private.begins_learned_round(proxy):
                begun.append(proxy)
                raise ZeroDivisionError

        private.before_building(net.conv.weight_quant, check)
        net = copy.deepcopy(net)
        proxy = net.conv.weight_quant
        before = private.injector(proxy)
        with pytest.raises(ZeroDivisionError):
            begin_learned_round(net)
        assert begun == [proxy], "the check is bound to the copy"
        assert private.injector(proxy) is not before
        private.set_injector(proxy, before)
        proxy.init_tensor_quant(preserve_state_dict=True)
        private.build_unchecked(proxy)
        begin_learned_round(net)
        assert len(begun) == 1
        assert not private.begins_learned_round(proxy), "it has begun"
        assert private.begins_learned_round(Net().conv.weight_quant) is False


def modes():
    from brevitas.graph.gpfq import GPFQ, gpfq_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.magr import magr_mode
    from brevitas.graph.qronos import Qronos

    return {
        "GPTQ": gptq_mode,
        "GPFQ": partial(gpfq_mode, algorithm_impl=GPFQ),
        "Qronos": partial(gpfq_mode, algorithm_impl=partial(Qronos, alpha=1e-6)),
        "MagR": magr_mode,
    }


@pytest.mark.parametrize("name", ["GPTQ", "GPFQ", "Qronos", "MagR"])
@pytest.mark.parametrize("traced", [False, True])
def test_modes_that_move_weights_are_met_at_their_entry(private, net, name, traced):
    from brevitas.fx import GraphModule, symbolic_trace
    from brevitas.graph.gpxq import gpxq_mode

    with needs(f"the mode of {name}", f"refusing {name} beside adapters"):
        if traced:
            plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
            net = symbolic_trace(plain)
            assert isinstance(net, GraphModule)
        owner = type(net)
        before = owner.forward, "forward" in vars(net)
        mode = modes()[name](net)
        assert type(mode).__enter__ is gpxq_mode.__enter__
        assert hasattr(gpxq_mode.__enter__, "cora_original")
        assert private.method_of(mode) == name
        assert (owner.forward, "forward" in vars(net)) != before
        private.give_forward_back(mode)
        assert (owner.forward, "forward" in vars(net)) == before


def test_a_model_with_a_forward_of_its_own_gets_it_back(private, net):
    from brevitas.graph.gptq import gptq_mode

    own = net.forward = lambda x: x
    private.give_forward_back(gptq_mode(net))
    assert net.forward is own


def test_modes_run_on_models_without_adapters(private, net, images):
    from brevitas.graph.gptq import gptq_mode

    weight = net.conv.weight.clone()
    with torch.no_grad(), gptq_mode(net) as mode:
        assert isinstance(mode, gptq_mode) and mode.num_layers == 2
        for _ in range(mode.num_layers):
            mode.model(images)
            mode.update()
    assert not torch.equal(net.conv.weight, weight)


def test_integer_activations_are_found(private, net, images):
    what = "fused_activation_quant_proxy and the quantizer in it"
    with needs(what, "quantizing activations faster"), torch.no_grad():
        found = list(private.integer_activations(net))
        assert len(found) == 2
        for quantizer, range_ in zip(found, [(-128, 127), (0, 255)], strict=True):
            value, scale, zero_point, bits = quantizer(images)
            assert private.integer_range(quantizer, bits) == range_
            levels = (images / scale + zero_point).round().clamp(*range_)
            torch.testing.assert_close(value, (levels - zero_point) * scale)


def test_searches_of_ranges_are_measured_by_another_function(private, net, images):
    from brevitas.quant.scaled_int import Int8ActPerTensorFloatMSE

    feature = "finding activation ranges faster"
    with needs("MSE.evaluate_loss and _mse_search", feature), torch.no_grad():
        for quantizer in private.integer_activations(net):
            assert not [*private.range_searches(quantizer)]
        layer = qnn.QuantIdentity(act_quant=Int8ActPerTensorFloatMSE)
        (quantizer,) = private.integer_activations(layer)
        (search,) = private.range_searches(quantizer)
        seen = []

        def error(x, scale, zero_point, bits):
            assert x is images and not zero_point and bits == 8
            seen.append(float(scale))
            return (scale - 0.01).abs()

        with private.measured_by(search, quantizer, error):
            layer(images)
        assert len(seen) == 20 and seen == sorted(seen)
        least = min(seen, key=lambda scale: abs(scale - 0.01))
        assert float(quantizer.eval()(images)[1]) == least
        assert not quantizer.observer_only and not search.local_loss_mode


MANAGERS = ("onnx_qcdq_manager", "qonnx_manager", "torch_qcdq_manager")


@pytest.mark.parametrize("manager", MANAGERS)
def test_exporters_are_asked_what_they_cannot_write(private, net, manager):
    from brevitas.quant.experimental.float import Fp8e4m3WeightPerTensorFloat

    feature = "saying which layer an exporter cannot write"
    with needs(f"the handlers of {manager}", feature):
        exporter = getattr(private, manager)()
        proxies = dict(private.quantizers(net))
        assert {*proxies} >= {"conv.weight_quant", "conv.input_quant"}
        assert all(private.unwritable(exporter, p) is None for p in proxies.values())
        proxy = net.conv.weight_quant
        net.conv.weight_quant.disable_quant = True
        assert "conv.weight_quant" not in dict(private.quantizers(net))
        proxy.disable_quant = False

        class Unknown(type(proxy)):
            pass

        proxy.__class__ = Unknown
        assert private.unwritable(exporter, proxy) == "no Unknown"
        if manager == "onnx_qcdq_manager":
            minifloat = qnn.QuantLinear(4, 2, False, Fp8e4m3WeightPerTensorFloat)
            assert "FP8" in private.unwritable(exporter, minifloat.weight_quant)


def test_groups_of_values_are_told(private):
    from brevitas.quant.experimental.mx_quant_ocp import MXInt8Weight

    with needs("is_groupwise", "saying which layer an exporter cannot write"):
        layer = qnn.QuantLinear(64, 4, False, MXInt8Weight)
        exporter = private.onnx_qcdq_manager()
        reason = private.unwritable(exporter, layer.weight_quant)
        assert "per group" in reason


def test_other_rounding_is_told(private, net):
    with needs("rounding_mode", "exporting QONNX after learned round"):
        assert not private.rounds_in_its_own_way(net)
        assert private.rounds_in_its_own_way(Net("FLOOR"))
        begin_learned_round(net)
        assert private.rounds_in_its_own_way(net)


def test_the_script_calls_its_helpers_by_name(private):
    from cora_plugin.integrations.brevitas.imagenet import _Step, stock_script

    with needs("ptq_evaluate", "cora-plugin brevitas-ptq"), stock_script() as script:
        function = script.quantize_ptq_imagenet
        assert private.missing_helpers(function) == set()
        assert private.missing_helpers(script.validate_args) == {
            *private.SCRIPT_HELPERS
        }
        ours = private.with_helpers(function, _Step, lambda *step: step)
        assert ours.__code__ is function.__code__
        for name in private.SCRIPT_HELPERS:
            assert ours.__globals__[name] == (name, getattr(_Step, name))
            assert callable(getattr(script, name))
        # And so are its own steps, whose failures say which they are.
        assert ours.__globals__["apply_gptq"] == ("apply_gptq", script.apply_gptq)
        assert ours.__globals__["torch"] is torch
        options = script.create_args_parser().parse_args([])
        for name in ("export_dir", "calibration_dir", "calibration_samples", "workers"):
            assert hasattr(options, name)


def test_the_recipe_maps_layers(private):
    from brevitas.graph.quantize import layerwise_quantize

    with needs("create_quant_maps", "the stock recipe, quantize_ptq"):
        made = private.layer_map(
            dtype=torch.float32,
            bias_bit_width=None,
            weight_bit_width=3,
            weight_param_method="mse",
            weight_scale_type="float_scale",
            weight_quant_type="sym",
            weight_quant_granularity="per_channel",
            weight_narrow_range=False,
            weight_quant_format="int",
            act_quant_format="int",
            act_scale_type="float_scale",
            act_param_method="stats",
            act_quant_type="asym",
            act_quant_granularity="per_tensor",
            act_quant_percentile=99.999,
            act_scale_computation_type="static",
            act_bit_width=8,
        )
        model = layerwise_quantize(nn.Sequential(nn.Linear(4, 2)), made)
        assert int(model[0].quant_weight().bit_width) == 3
        assert model[0].input_quant.is_quant_enabled
