"""What the plugin uses of NNCF beyond its public interface is as it was.

A failure says which name has changed and what depends on it.
"""

import copy
import inspect

import nncf
import pytest
import torch
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    QuantizationParameters,
)
from nncf.quantization.algorithms.pipeline import Pipeline
from privates import Privates
from torch import nn

PRIVATES = Privates("nncf", "3.4.0")
needs = PRIVATES.needs

HOOKS = "nncf.torch.function_hook"
NAMES = {
    (HOOKS, "get_hook_storage"): "adapters, and reading a model",
    (HOOKS, "is_wrapped"): "telling models that NNCF quantized",
    (f"{HOOKS}.hook_storage", "HookStorage"): "bit widths of single layers",
    (f"{HOOKS}.hook_storage", "RemovableHookHandle"): "adapters",
    (f"{HOOKS}.hook_storage", "decode_hook_name"): "reading a model",
    (
        f"{HOOKS}.nncf_graph.nncf_graph_builder",
        "build_nncf_graph",
    ): "reading a model",
    ("nncf.torch.extensions", "EXTENSION_LOAD_TIMEOUT_ENV_VAR"): (
        "compiling the extension for as long as it takes"
    ),
    ("nncf.torch.graph", "operator_metatypes"): "reading a model",
    ("nncf.torch.layer_utils", "StatefulModuleInterface"): (
        "adapters that survive get_config"
    ),
    ("nncf.torch.model_graph_manager", "get_const_data_on_port"): (
        "bit widths of single layers"
    ),
    ("nncf.torch.model_graph_manager", "get_const_node"): (
        "adapters from a float model that is passed as reference"
    ),
    ("nncf.torch.quantization.extensions", "QuantizedFunctionsCPU"): (
        "loading the extension without waiting in vain"
    ),
    ("nncf.torch.quantization.extensions", "QuantizedFunctionsCUDA"): (
        "loading the extension of a GPU"
    ),
    ("nncf.torch.quantization.layers", "BaseWeightsDecompressor"): (
        "saying that compress_weights keeps no float weights"
    ),
    ("nncf.torch.quantization.layers", "PTQuantizerSpec"): "storing adapters",
    ("nncf.torch.quantization.quantize_functions", "TuneRange"): (
        "quantizing activations faster"
    ),
    ("nncf.torch.quantization.reference", "ReferenceQuantizedFunctions"): (
        "models on a GPU where no CUDA compiler is installed"
    ),
    ("nncf.torch.return_types", "maybe_get_values_from_torch_return_type"): (
        "quantizing activations faster"
    ),
    ("nncf.torch.return_types", "maybe_wrap_to_torch_return_type"): (
        "quantizing activations faster"
    ),
}
# Imported as modules, for what is replaced in them.
REPLACED = {
    ("nncf.common.hardware.config", "get_hw_setup"): "allow_bits",
    (
        "nncf.quantization.algorithms.post_training.algorithm",
        "create_ptq_pipeline",
    ): "the flag in nncf.quantize",
    (
        f"{HOOKS}.quantization.quantize_model",
        "quantize_impl",
    ): "checking the flag's calibration data",
}


@pytest.mark.parametrize(("place", "feature"), {**NAMES, **REPLACED}.items())
def test_the_name_exists(place, feature):
    PRIVATES.exists(*place, feature)


def test_every_name_is_checked():
    assert PRIVATES.imported() == {*NAMES}


def test_they_are_reached_in_one_place():
    attributes = {
        "create_ptq_pipeline",
        "get_build_dir",
        "get_hw_setup",
        "post_hooks",
        "pre_hooks",
    }
    assert PRIVATES.reached_elsewhere(attributes) == []


@pytest.fixture(scope="module")
def private():
    with needs("what private.py imports", "the whole host"):
        from cora_plugin.integrations.nncf import private

        return private


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


CONV = "block/0/conv2d/0"
PARAMETERS = AdvancedQuantizationParameters(
    weights_quantization_params=QuantizationParameters(num_bits=4),
    disable_bias_correction=True,
)


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.randn(8, 3, 8, 8)


@pytest.fixture(scope="module")
def quantized(private, images):
    torch.manual_seed(0)
    data = nncf.Dataset([images])
    with needs("get_hw_setup", "allow_bits"), private.more_widths((4,)):
        return nncf.quantize(Net().eval(), data, advanced_parameters=PARAMETERS)


@pytest.fixture
def net(quantized):
    return copy.deepcopy(quantized)


@pytest.fixture
def weight_quantizer(private, net):
    with needs("the hooks of a model", "bit widths of single layers"):
        (quantizer,) = private.hooks_of(net, "pre_hooks", CONV, 1)
        return quantizer


def test_the_pipeline_is_built_where_it_is_looked_up(private, monkeypatch):
    from nncf.quantization.algorithms.post_training import algorithm as post_training

    with needs("create_ptq_pipeline", "the flag in nncf.quantize"):
        stock = post_training.create_ptq_pipeline.cora_original
        names = {"advanced_parameters", "subset_size"}
        assert names <= {*inspect.signature(stock).parameters}
        calls = []

        def build(*args, **kwargs):
            calls.append((args, kwargs))
            return stock(*args, **kwargs)

        monkeypatch.setattr(post_training, "create_ptq_pipeline", build)
        given = AdvancedQuantizationParameters()
        algorithm = post_training.PostTrainingQuantization(
            advanced_parameters=given, subset_size=7
        )
        ((args, kwargs),) = calls
        assert args == ()
        assert kwargs["advanced_parameters"] is given and kwargs["subset_size"] == 7
        assert type(algorithm._pipeline) is Pipeline
        assert all(
            isinstance(step, list) for step in algorithm._pipeline.pipeline_steps
        )


def test_torch_models_are_quantized_where_it_is_looked_up(private, monkeypatch):
    from nncf.torch.function_hook.quantization import quantize_model

    with needs("quantize_impl", "checking the flag's calibration data"):
        assert quantize_model.quantize_impl.cora_original
        monkeypatch.setattr(quantize_model, "quantize_impl", lambda **given: given)
        data, parameters = nncf.Dataset([1]), AdvancedQuantizationParameters()
        given = nncf.quantize(nn.ReLU(), data, advanced_parameters=parameters)
        assert given["calibration_dataset"] is data
        assert given["advanced_parameters"] is parameters


def test_functions_are_replaced_once(private, monkeypatch):
    from nncf.quantization.algorithms.post_training import algorithm as post_training

    before = post_training.create_ptq_pipeline
    monkeypatch.setattr(post_training, "create_ptq_pipeline", before)
    seen = []
    private.wrap_pipeline(lambda original: seen.append(original) or (lambda: 1))
    private.wrap_pipeline(lambda original: seen.append(original) or (lambda: 2))
    assert seen == [before.cora_original] * 2
    assert post_training.create_ptq_pipeline() == 2


def test_width_that_is_not_listed_is_refused_so(private, images):
    feature = "the error that names allow_bits"
    with needs("the error for a bit width", feature):
        with pytest.raises(ValueError) as caught:
            nncf.quantize(
                Net().eval(), nncf.Dataset([images]), advanced_parameters=PARAMETERS
            )
        assert private.is_width_refused(caught.value)
        assert not private.is_width_refused(ValueError("another"))


def test_tables_list_more_widths(private):
    from nncf.common.hardware import config

    with needs("get_hw_setup", "allow_bits"):
        before = config.get_hw_setup(nncf.TargetDevice.ANY)
        with private.more_widths((3,)):
            after = config.get_hw_setup(nncf.TargetDevice.ANY)
        assert config.get_hw_setup(nncf.TargetDevice.ANY) == before
        widths = {space.bits for each in after for space in each.weights}
        assert {3, 8} <= widths
        assert [each.type for each in after] == [each.type for each in before]


def test_configuration_has_its_own_width(private, weight_quantizer):
    with needs("_qspec", "bit widths of single layers that survive get_config"):
        assert weight_quantizer.num_bits == 4
        assert weight_quantizer.get_config()["num_bits"] == 4
        private.set_bits_of_config(weight_quantizer, 6)
        assert weight_quantizer.get_config()["num_bits"] == 6


def test_narrow_range_is_a_flag_of_traces(private, net, weight_quantizer):
    feature = "OpenVINO IR and ONNX with the integers of the model"
    with needs("_narrow_range", feature), torch.no_grad():
        weight = net.block[0].weight
        weight_quantizer._narrow_range = True
        before = weight_quantizer.quantize(weight)
        private.trace_whole_range(weight_quantizer)
        assert weight_quantizer.narrow_range is False
        assert torch.equal(weight_quantizer.quantize(weight), before)


def test_a_scale_of_all_channels_is_traced_as_that_of_a_tensor(private, net):
    with needs("per_channel", "exports of depthwise transposed convolutions"):
        quantizers = [m for m in net.modules() if hasattr(m, "scale_shape")]
        several = next(q for q in quantizers if q.scale_shape[0] > 1)
        one = copy.deepcopy(several)
        private.trace_one_scale(several)
        assert several.per_channel
        one._scale_shape = (1, 1, 1, 1)
        assert one.scale_shape == (1, 1, 1, 1)
        private.trace_one_scale(one)
        assert not one.per_channel


def test_hooks_are_kept_by_operation_and_port(private, net, images):
    feature = "adapters, reading a model"
    with needs("HookStorage", feature), torch.no_grad():
        assert private.is_wrapped(net) and not private.is_wrapped(Net())
        storage = private.get_hook_storage(net)
        names = [
            private.decode_hook_name(name)
            for name, _ in storage.named_hooks(remove_duplicate=False)
        ]
        assert ("pre_hooks", CONV, 1) in names and ("post_hooks", "x", 0) in names
        before, seen = net(images), []

        class Hook(nn.Module):
            def forward(self, x):
                seen.append(x)
                return x + 1

        # On the input behind its quantizer, and on the output.
        hook = Hook()
        first = storage.register_pre_function_hook(CONV, 0, hook)
        last = storage.register_post_function_hook(CONV, 0, hook)
        assert isinstance(first, private.RemovableHookHandle)
        assert private.hooks_of(net, "pre_hooks", CONV, 0) == [hook]
        on_inputs, on_outputs = private.hook_places(net)
        assert [*on_inputs[first.key].values()] == [hook]
        assert [*on_outputs[last.key].values()] == [hook]
        net(images)
        x, y = seen
        (quantizer,) = private.hooks_of(net, "pre_hooks", CONV, 1)
        conv = net.block[0]
        expected = nn.functional.conv2d(
            x + 1, quantizer.quantize(conv.weight), conv.bias, padding=1
        )
        torch.testing.assert_close(y, expected)
        first.remove()
        last.remove()
        assert private.hooks_of(net, "pre_hooks", CONV, 0) == []
        assert torch.equal(net(images), before)


def test_dots_in_names_are_kept(private, net):
    with needs("HookStorage._generate_key", "bit widths of single layers"):
        storage = private.get_hook_storage(net)
        hook = nn.Identity()
        handle = storage.register_post_function_hook("a.b/relu/0", 2, hook)
        assert private.hooks_of(net, "post_hooks", "a.b/relu/0", 2) == [hook]
        handle.remove()


def test_graph_tells_of_weights(private, net, images):
    with needs("build_nncf_graph", "reading a model"):
        graph = private.build_nncf_graph(net, images)
        node = graph.get_node_by_name(CONV)
        kinds = private.operator_metatypes
        assert node.metatype in kinds.CONVOLUTION_METATYPES
        assert node.node_type == "conv2d"
        assert node.metatype.weight_port_ids == [1]
        attributes = node.layer_attributes
        assert attributes.constant_port_ids == {1, 2}
        named = {**dict(enumerate(attributes.op_args)), **attributes.op_kwargs}
        assert named[4] == (1, 1), "padding"
        head = graph.get_node_by_name("head/linear/0")
        assert head.metatype in kinds.MATMUL_METATYPES
        assert kinds.PTDeformConv2dMetatype.weight_port_ids
        (before,) = (
            edge.from_node
            for edge in graph.get_input_edges(node)
            if edge.input_port_id == 0
        )
        assert before.node_type in kinds.QUANTIZE_NODE_TYPES
        assert kinds.CONST_NOOP_METATYPES
    with needs("get_const_node", "adapters from a reference"):
        constant = private.get_const_node(node, 1, graph)
        assert constant.layer_attributes.name == "block.0.weight"
        assert constant.metatype in kinds.CONST_NOOP_METATYPES
    with needs("get_const_data_on_port", "bit widths of single layers"):
        weight = private.get_const_data_on_port(net, graph, node, 1)
        assert torch.equal(weight, net.block[0].weight)


def test_stateful_hooks_owe_a_configuration(private):
    with needs("StatefulModuleInterface", "adapters that survive get_config"):
        owed = private.StatefulModuleInterface.__abstractmethods__
        assert owed == {"get_config", "from_config"}


def test_a_factor_has_a_quantizer_of_its_own(private):
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.torch.quantization.layers import SymmetricQuantizer

    with needs("PTQuantizerSpec", "storing adapters"), torch.no_grad():
        spec = private.PTQuantizerSpec(
            num_bits=4,
            mode=QuantizationScheme.SYMMETRIC,
            signedness_to_force=True,
            narrow_range=True,
            half_range=False,
            scale_shape=(2, 1),
            logarithm_scale=False,
        )
        quantizer = SymmetricQuantizer(spec)
        quantizer.scale.copy_(torch.tensor([[7.0], [14.0]]))
        x = torch.tensor([[-9.0, 0.4, 3.6], [-9.1, 1.1, 20.0]])
        expected = torch.tensor([[-7.0, 0.0, 4.0], [-10.0, 2.0, 14.0]])
        torch.testing.assert_close(quantizer.quantize(x), expected)


def test_ranges_are_tuned_to_hold_zero(private):
    with needs("TuneRange", "quantizing activations faster"):
        low, span = torch.tensor([-1.03]), torch.tensor([4.0])
        low, span = private.TuneRange.apply(low, span, 256)
        zero = -low * 255 / span
        torch.testing.assert_close(zero, zero.round(), atol=1e-3, rtol=0)


def test_returns_with_indices_are_taken_apart(private):
    with needs("nncf.torch.return_types", "quantizing activations faster"):
        given = torch.randn(3, 4).max(1)
        values = private.maybe_get_values_from_torch_return_type(given)
        assert values is given.values
        again = private.maybe_wrap_to_torch_return_type(2 * values, given)
        assert type(again) is type(given)
        assert torch.equal(again.values, 2 * values)
        assert torch.equal(again.indices, given.indices)
        assert private.maybe_wrap_to_torch_return_type(values, values) is values


def test_the_extension_is_loaded_from_its_folder(private, tmp_path, monkeypatch):
    feature = "loading the extension without waiting in vain"
    with needs("QuantizedFunctionsCPU", feature):
        private.load()
        assert private.is_loaded()
        assert list(private.build_folder().glob("*.so"))
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        assert tmp_path in private.build_folder().parents
        from nncf.torch.quantization.extensions import QuantizedFunctionsCPU

        fresh = type(QuantizedFunctionsCPU)(None)
        monkeypatch.setattr(private, "QuantizedFunctionsCPU", fresh)
        assert not private.is_loaded()
