"""What is peculiar to NNCF; what every host owes is tested in test_contract.py."""

import copy
import dataclasses
import json
import pickle
from importlib.util import find_spec

import nncf
import pytest
import torch
import torch.nn.functional as F
from host_checks import kl, run
from nncf.common.hardware import config as hardware
from nncf.parameters import ModelType
from nncf.quantization.advanced_parameters import (
    AdvancedBiasCorrectionParameters,
    AdvancedQuantizationParameters,
    QuantizationParameters,
)
from nncf.quantization.algorithms.post_training.algorithm import (
    PostTrainingQuantization,
)
from nncf.torch import get_config, load_from_config
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import BaseQuantizer, SymmetricQuantizer
from torch import nn
from untouched import untouched

from cora_plugin import CoRa, CoRaConfig, CoRaError, steps
from cora_plugin.adapters import Adapter, Form, Kind
from cora_plugin.integrations.nncf import (
    CoRaAlgorithm,
    CoRaQuantizationParameters,
    LayerBits,
    NNCFHost,
    allow_bits,
    apply_cora,
    quantize_ptq,
    register,
    remove_cora,
    unregister,
)
from cora_plugin.integrations.nncf.bits import set_bits
from cora_plugin.integrations.nncf.extension import (
    await_lock,
    is_compiled,
    load_extension,
)
from cora_plugin.integrations.nncf.fast import fused_quantizers, range_of
from cora_plugin.integrations.nncf.insert import (
    CoRaBranch,
    CoRaShift,
    CoRaTap,
)
from cora_plugin.integrations.nncf.toolkit import TOOLKIT
from cora_plugin.outputs import only

CONFIG = {"budget": 0.3}


class Odd(nn.Module):
    """A conv called twice, a functional one, a transposed one, an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.twice = nn.Conv2d(12, 12, 1)
        self.kernel = nn.Parameter(0.3 * torch.randn(12, 3, 3, 3))
        self.up = nn.ConvTranspose2d(12, 12, 2, stride=2)
        self.line = nn.Conv1d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = self.twice(self.twice(x)) + x
        x = F.relu(F.conv2d(x, self.kernel, stride=2, padding=1, groups=4))
        x = F.relu(self.up(x))
        x = F.relu(self.line(x.flatten(2)))
        return self.head(x.mean(2))


def parameters(bits=4, **fields):
    return AdvancedQuantizationParameters(
        weights_quantization_params=QuantizationParameters(num_bits=bits), **fields
    )


def typed(cora=None, bits=4, **fields):
    return CoRaQuantizationParameters(
        cora=cora,
        weights_quantization_params=QuantizationParameters(num_bits=bits),
        **fields,
    )


@pytest.fixture(scope="module")
def dataset(batches):
    return nncf.Dataset(batches, lambda item: item[0])


@pytest.fixture(scope="module")
def quantized(float_net, dataset):
    """The small net by NNCF's own means, biases not corrected; copy before use."""
    with allow_bits(4):
        return nncf.quantize(
            float_net,
            dataset,
            advanced_parameters=parameters(disable_bias_correction=True),
        )


@pytest.fixture
def model(quantized):
    return copy.deepcopy(quantized)


@pytest.fixture(scope="module")
def adapted_net(quantized, dataset):
    """The same with adapters of every kind; copy before use."""
    net = copy.deepcopy(quantized)
    config = {"budget": 0.9, "ranks": {"depthwise": 4, "pointwise": 4, "head": 3}}
    report = apply_cora(net, dataset, config)
    assert {row.kind for row in report.layers} >= {"low-rank", "shared-basis"}
    return net


@pytest.fixture(scope="module")
def odd(batches):
    torch.manual_seed(0)
    net = Odd()
    net.train()
    for images, _ in batches:
        net(images)
    net.eval()
    with allow_bits(4):
        return net, nncf.quantize(
            net,
            nncf.Dataset([images for images, _ in batches]),
            advanced_parameters=parameters(disable_bias_correction=True),
        )


def pipeline_of(flag):
    """The algorithms that `nncf.quantize` would run with these parameters."""
    algorithm = PostTrainingQuantization(advanced_parameters=flag)
    return [step for steps in algorithm._pipeline.pipeline_steps for step in steps]


def adapts(flag):
    return any(isinstance(step, CoRaAlgorithm) for step in pipeline_of(flag))


def quantizers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseQuantizer)
    }


class TestFlag:
    @pytest.mark.parametrize(
        "flag",
        [
            lambda: typed(CoRaConfig(budget=0.3)),
            lambda: typed("budget=0.3"),
            lambda: parameters(backend_params={"cora": {"budget": 0.3}}),
        ],
    )
    def test_adapts_inside_quantize(self, flag, float_net, dataset, unseen):
        with register(), allow_bits(4):
            plain = nncf.quantize(float_net, dataset, advanced_parameters=parameters())
            model = nncf.quantize(float_net, dataset, advanced_parameters=flag())
        reference = run(float_net, unseen)
        assert kl(reference, run(model, unseen)) < 0.5 * kl(
            reference, run(plain, unseen)
        )
        kept = {step.name: step.kept for step in model.cora_report.steps}
        assert list(kept)[:3] == ["adapters", "bias correction", "regression"]
        assert model.cora_report.images + model.cora_report.held_out == 64
        assert not hasattr(float_net, "__nncf_hooks")

    def test_without_it_nothing_changes(self, float_net, dataset, unseen):
        before = nncf.quantize(float_net, dataset).state_dict()
        with register():
            after = nncf.quantize(float_net, dataset).state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_register_is_idempotent_and_reversible(self):
        flag = parameters(8, backend_params={"cora": {"budget": 0.3}})

        def read():
            """Whether the pipeline that NNCF builds has our step."""
            try:
                return adapts(flag)
            except CoRaError as error:
                assert "register() before nncf.quantize" in str(error)
                return False

        assert not read()
        register()
        assert read()
        with register():
            assert read()
        assert read()
        unregister()
        assert not read()
        unregister()
        assert not read()
        with register():
            assert read()
        with pytest.raises(ZeroDivisionError), register():
            _ = 1 / 0
        assert not read()

    def test_an_unread_flag_is_refused(self, float_net, dataset):
        flag = parameters(8, backend_params={"cora": {"budget": 0.3}})
        match = r'^backend_params: "cora" .*register\(\) before nncf\.quantize'
        with untouched(float_net), pytest.raises(CoRaError, match=match):
            nncf.quantize(float_net, dataset, advanced_parameters=flag)
        off = parameters(8, backend_params={"cora": False, "other": 1})
        assert not adapts(off)

    @pytest.mark.parametrize("name", ["Cora", "CoRa", "core", "cora_plugin", "corra"])
    def test_a_misspelt_flag_is_refused(self, name, float_net, dataset):
        match = rf"^backend_params: '{name}' is nothing.* did you mean 'cora'"
        for kind in (parameters, typed):
            flag = kind(bits=8, backend_params={name: "budget=0.3"})
            with untouched(float_net), pytest.raises(CoRaError, match=match):
                nncf.quantize(float_net, dataset, advanced_parameters=flag)

    def test_what_nncf_reads_is_left_to_it(self):
        theirs = {"compress_weights": False, "external_data_dir": "x", "score": 1}
        assert not adapts(parameters(8, backend_params=theirs))

    @pytest.mark.parametrize(
        "way",
        [
            lambda flag: flag,
            copy.copy,
            copy.deepcopy,
            dataclasses.replace,
            lambda flag: pickle.loads(pickle.dumps(flag)),
            lambda flag: pickle.loads(pickle.dumps(flag, protocol=0)),
        ],
    )
    @pytest.mark.parametrize(
        "fields",
        [
            {"cora": {"budget": 0.3}},
            {"backend_params": {"cora": "budget=0.3"}},
            {"depthwise_bits": 4},
        ],
    )
    def test_typed_parameters_need_no_registration(self, way, fields):
        flag = CoRaQuantizationParameters(**fields)
        with register():
            made_within = CoRaQuantizationParameters(**fields)
        unregister()
        for each in (flag, made_within):
            steps = {type(step) for step in pipeline_of(way(each))}
            assert (LayerBits in steps) == ("depthwise_bits" in fields)
            assert (CoRaAlgorithm in steps) == ("depthwise_bits" not in fields)

    def test_typed_parameters_adapt_without_registration(self, float_net, dataset):
        flag = CoRaQuantizationParameters(cora={"budget": 0.3})
        model = nncf.quantize(float_net, dataset, advanced_parameters=flag)
        assert model.cora_report.steps[0].name == "adapters"

    def test_a_flag_that_is_set_later_is_read(self):
        flag = CoRaQuantizationParameters()
        assert not adapts(flag)
        flag.cora = "budget=0.3"
        assert adapts(flag)

    def test_typed_parameters_can_be_looked_at(self):
        flag = CoRaQuantizationParameters(cora="budget=0.3", depthwise_bits=8)
        assert "cora='budget=0.3'" in repr(flag)
        other = dataclasses.replace(flag, depthwise_bits=4)
        assert (other.cora, other.depthwise_bits) == ("budget=0.3", 4)
        assert flag != other and flag == copy.deepcopy(flag)
        assert dataclasses.asdict(flag)["cora"] == "budget=0.3"

    def test_unset_typed_parameters_are_stock(self, float_net, dataset):
        nncf.quantize(
            float_net, dataset, advanced_parameters=CoRaQuantizationParameters()
        )

    def test_disabled_bias_correction_stays_disabled(self, float_net, dataset):
        with register(), allow_bits(4):
            model = nncf.quantize(
                float_net,
                dataset,
                advanced_parameters=typed(CONFIG, disable_bias_correction=True),
            )
        names = [step.name for step in model.cora_report.steps]
        assert names[:2] == ["adapters", "regression"]
        assert not any("bias" in name for name in names)

    def test_smooth_quant_keeps_working(self, float_net, dataset, unseen):
        with register(), allow_bits(4):
            model = nncf.quantize(
                float_net,
                dataset,
                model_type=ModelType.TRANSFORMER,
                advanced_parameters=typed(CONFIG),
            )
        hooks = {type(m).__name__ for m in get_hook_storage(model).modules()}
        assert "SQMultiply" in hooks
        report = model.cora_report
        assert report.steps[0].kept
        assert report.after.kl < 0.5 * report.before.kl

    def test_subset_size_counts_items(self, float_net, dataset):
        with register():
            model = nncf.quantize(
                float_net, dataset, subset_size=2, advanced_parameters=typed(CONFIG, 8)
            )
        assert model.cora_report.images + model.cora_report.held_out == 32

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (tuple, r"item 0 of the nncf.Dataset is a tuple of \(Tensor, Tensor\)"),
            (list, r"item 0 of the nncf.Dataset is a list of \(Tensor, Tensor\)"),
            (lambda pair: [pair[0]], r"a list of \(Tensor\)"),
            (lambda pair: {"x": pair[0], "y": pair[1]}, r"a dict of \(Tensor, Tensor"),
            (lambda pair: pair[0].numpy(), "is a ndarray, and NNCF would call"),
        ],
    )
    def test_items_that_are_not_images_alone(self, float_net, batches, kind, message):
        data = nncf.Dataset([kind(pair) for pair in batches])
        with register(), untouched(float_net):
            with pytest.raises(CoRaError, match=message):
                nncf.quantize(float_net, data, advanced_parameters=typed(CONFIG, 8))
            with pytest.raises((TypeError, AttributeError)):
                nncf.quantize(float_net, data)  # as without us

    def test_images_by_name_and_alone_in_a_tuple(self, float_net, batches):
        images = [images for images, _ in batches]
        data = nncf.Dataset([{"x": images[0]}, (images[1],), *images[2:]])
        with register():
            model = nncf.quantize(float_net, data, advanced_parameters=typed(CONFIG, 8))
        assert model.cora_report.images + model.cora_report.held_out == 64

    def test_unknown_setting_fails_at_once(self, float_net, dataset):
        flag, match = typed({"budgte": 0.05}), "unknown key 'budgte'"
        with register(), untouched(float_net), pytest.raises(CoRaError, match=match):
            nncf.quantize(float_net, dataset, advanced_parameters=flag)


class TestApply:
    @pytest.mark.parametrize("regression", [False, True])
    def test_reference_gives_back_corrected_biases(
        self, regression, float_net, dataset, unseen
    ):
        with allow_bits(4):
            model = nncf.quantize(
                float_net,
                dataset,
                advanced_parameters=parameters(
                    bias_correction_params=AdvancedBiasCorrectionParameters(
                        threshold=float("inf")
                    )
                ),
            )
        assert not torch.equal(model.head.bias, float_net.head.bias)
        host = NNCFHost(model, unseen, float_net)
        with torch.no_grad(), host.prepared(), host.acting(quantized=False):
            assert torch.equal(only(host.run(unseen)), float_net(unseen))
        before = kl(run(float_net, unseen), run(model, unseen))
        corrected = model.head.bias.clone()
        config = {**CONFIG, "regression": regression}
        report = apply_cora(model, dataset, config, reference=float_net)
        kept = {step.name: step.kept for step in report.steps}
        steps = ["adapters", "float biases", "bias correction"]
        assert list(kept)[:3] == steps
        assert ("regression" in kept) == regression
        # The regression was found with float biases, and brings them with it.
        given_back = kept["float biases"] or kept.get("regression")
        bias = float_net.head.bias if given_back else corrected
        assert torch.equal(model.head.bias, bias)
        assert kl(run(float_net, unseen), run(model, unseen)) < before
        assert report.after == [s.after for s in report.steps if s.kept][-1]

    def test_reference_that_does_not_fit(self, model, unseen, float_net):
        other = copy.deepcopy(float_net)
        other.head.weight.data.neg_()
        for reference, match in (
            (other, r"head: the reference.s weight has n"),
            ({}, r"stem: .* no weight .* its stem\.weight"),
        ):
            with untouched(model), pytest.raises(CoRaError, match=match):
                _ = NNCFHost(model, unseen, reference).layers

    def test_a_correction_that_harms_is_taken_back(self, model, dataset, monkeypatch):
        right = steps.own_shifts
        monkeypatch.setattr(
            steps,
            "own_shifts",
            lambda *a: {name: 9 + value for name, value in right(*a).items()},
        )
        report = apply_cora(model, dataset, {**CONFIG, "metric": "qera-exact"})
        assert report.steps[1].name == "bias correction"
        assert not report.steps[1].kept
        assert report.after == report.steps[0].after
        assert not any(isinstance(m, CoRaShift) for m in model.modules())

    def test_failing_correction_leaves_the_model(
        self, model, quantized, dataset, unseen, monkeypatch
    ):
        monkeypatch.setattr(steps, "own_shifts", lambda *a: 1 / 0)
        with untouched(model), pytest.raises(ZeroDivisionError):
            apply_cora(model, dataset, {**CONFIG, "metric": "qera-exact"})
        assert torch.equal(run(model, unseen), run(quantized, unseen))

    def test_algorithm_without_a_dataset(self, model):
        match = "needs the calibration dataset"
        with untouched(model), pytest.raises(CoRaError, match=match):
            CoRaAlgorithm(CONFIG).apply(model, None)

    @pytest.mark.parametrize("size", [0, -3])
    def test_subset_size(self, model, dataset, size, float_net):
        match = f"subset_size: {size} uses no data"
        with untouched(model), pytest.raises(CoRaError, match=match):
            apply_cora(model, dataset, subset_size=size)
        with (
            register(),
            untouched(float_net),
            pytest.raises(nncf.ValidationError, match="must be positive"),
        ):
            nncf.quantize(
                float_net,
                dataset,
                subset_size=size,
                advanced_parameters=typed(CONFIG, 8),
            )

    def test_empty_dataset(self, model):
        with untouched(model), pytest.raises(CoRaError, match="the dataset is empty"):
            apply_cora(model, nncf.Dataset([]))

    def test_items_that_unpack_wrongly(self, model, quantized, batches, unseen):
        match = r"item 0 .*Tensor, Tensor\), and NNCF"
        with untouched(model), pytest.raises(CoRaError, match=match):
            apply_cora(model, nncf.Dataset(batches))
        assert torch.equal(run(model, unseen), run(quantized, unseen))

    def test_takes_loaders_of_images_and_targets(self, model, batches):
        assert apply_cora(model, iter(batches), CONFIG).images == 52

    @pytest.mark.parametrize("seen", [True, False])
    def test_models_of_other_kinds(self, float_net, dataset, seen):
        match = "was not quantized by NNCF"
        with untouched(float_net), pytest.raises(CoRaError, match=match):
            apply_cora(float_net, dataset)
        with pytest.raises(CoRaError, match=r"str; .*PyTorch .* only, not OpenVINO"):
            apply_cora("model.xml", dataset)


class TestBackends:
    def test_openvino_model(self, float_net, batches, unseen):
        import openvino

        model = openvino.convert_model(float_net, example_input=unseen)
        data = nncf.Dataset([images.numpy() for images, _ in batches])
        before = [node.get_friendly_name() for node in model.get_ordered_ops()]
        with register(), pytest.raises(CoRaError, match="OPENVINO backend; supported"):
            nncf.quantize(model, data, advanced_parameters=typed(CONFIG, 8))
        with pytest.raises(CoRaError, match="not OpenVINO, ONNX or TorchFX"):
            apply_cora(model, data)
        assert [node.get_friendly_name() for node in model.get_ordered_ops()] == before

    def test_onnx_model(self, float_net, batches, unseen, tmp_path):
        import onnx

        path = tmp_path / "net.onnx"
        torch.onnx.export(
            float_net, (unseen,), path, dynamo=False, input_names=["input"]
        )
        model, data = onnx.load(path), nncf.Dataset([{"input": unseen.numpy()}])
        with register(), pytest.raises(CoRaError, match="ONNX backend; supported"):
            nncf.quantize(model, data, advanced_parameters=typed(CONFIG, 8))
        with pytest.raises(CoRaError, match="not OpenVINO, ONNX or TorchFX"):
            apply_cora(model, data)
        assert model == onnx.load(path)

    def test_fx_model(self, float_net, dataset, unseen):
        program = torch.export.export(float_net, (unseen[:16],))
        match = "not OpenVINO, ONNX or TorchFX"
        with untouched(program.graph_module), pytest.raises(CoRaError, match=match):
            apply_cora(program, dataset)
        model = program.module()
        with untouched(model), pytest.raises(CoRaError, match=match):
            apply_cora(model, dataset)

    @pytest.mark.skipif(find_spec("torchao") is None, reason="NNCF's TorchFX needs it")
    @pytest.mark.parametrize(
        "flag", [typed(CONFIG, 8), parameters(8, backend_params={"cora": CONFIG})]
    )
    def test_fx_model_inside_quantize(self, float_net, dataset, unseen, flag):
        model = torch.export.export(float_net, (unseen[:16],)).module()
        match = "TORCH_FX backend; supported"
        with register(), untouched(model), pytest.raises(CoRaError, match=match):
            nncf.quantize(model, dataset, advanced_parameters=flag)


class TestBits:
    @pytest.mark.parametrize("bits", [4, 3, 2])
    def test_allowed_within_the_scope_alone(self, bits, float_net, dataset):
        fields = {
            "disable_bias_correction": True,
            "activations_quantization_params": QuantizationParameters(num_bits=bits),
        }
        before = hardware.get_hw_setup
        with allow_bits(bits):
            model = nncf.quantize(
                float_net, dataset, advanced_parameters=parameters(bits, **fields)
            )
        assert {q.num_bits for q in quantizers(model).values()} == {bits}
        with pytest.raises(ZeroDivisionError), allow_bits(bits):
            _ = 1 / 0
        assert hardware.get_hw_setup is before
        match = "HW capabilities"
        with untouched(float_net), pytest.raises(ValueError, match=match):
            nncf.quantize(
                float_net, dataset, advanced_parameters=parameters(bits, **fields)
            )

    def test_refused_bits_name_the_way_out(self, float_net, dataset):
        flag, match = typed(CONFIG), r"num_bits: .*allow_bits\(4\)"
        with register(), untouched(float_net), pytest.raises(CoRaError, match=match):
            nncf.quantize(float_net, dataset, advanced_parameters=flag)

    @pytest.mark.parametrize("bits", [1, 9, 4.0, True])
    def test_impossible_bits(self, bits):
        with pytest.raises(CoRaError, match=r"bits are out of range; use 2 to 8"):
            with allow_bits(bits):
                pass

    @pytest.mark.parametrize("act_bits", [8, 4])
    def test_first_last_and_depthwise(self, float_net, batches, act_bits):
        model = quantize_ptq(float_net, batches, 3, act_bits, depthwise_bits=6)
        by_layer = {
            layer.name: layer.weight_bits
            for layer in NNCFHost(model, batches[0][0]).layers
        }
        assert by_layer == {
            "stem": 8,
            "reflect": 3,
            "depthwise": 6,
            "pointwise": 3,
            "same": 3,
            "dilated": 3,
            "head": 8,
        }
        found = {n.rpartition("hooks.")[2]: q for n, q in quantizers(model).items()}
        widths = {name: q.num_bits for name, q in found.items() if "__0" in name}
        raised = {name for name, bits in widths.items() if bits == 8}
        if act_bits == 4:
            assert raised == {"x__0.0", "pool/adaptive_avg_pool2d/0__0.0"}
        else:
            assert set(widths.values()) == {8}

    def test_bits_of_single_layers(self, float_net, batches, dataset):
        bits = {"p*": 5, "*": 3, "dil*": 6, "stem": 4}
        model = quantize_ptq(float_net, batches, depthwise_bits=8, layer_bits=bits)
        layers = NNCFHost(model, batches[0][0]).layers
        found = {layer.name: layer.weight_bits for layer in layers}
        assert found == {**dict.fromkeys(found, 3), "dilated": 6, "stem": 4}
        for wrong, match in (
            (
                {"tail*": 8},
                r"layer_bits: 'tail\*' fits no layer; they are stem, reflect",
            ),
            ({"head": 9}, r"layer_bits: head: 9 bits are out of range; use 2 to 8"),
            ([8], r"layer_bits: \[8\] is not a mapping of names to values"),
        ):
            with (
                register(),
                allow_bits(4),
                untouched(float_net),
                pytest.raises(CoRaError, match=match),
            ):
                nncf.quantize(
                    float_net,
                    dataset,
                    advanced_parameters=typed(None, layer_bits=wrong),
                )

    def test_reading_parameters_checks_nothing(self):
        assert "layer_bits={'head': 9}" in repr(typed(None, layer_bits={"head": 9}))

    def test_bits_survive_the_configuration(self, float_net, batches, unseen):
        model = quantize_ptq(float_net, batches, 4, 4, depthwise_bits=8)
        fresh = copy.deepcopy(float_net)
        other = load_from_config(fresh, json.loads(json.dumps(get_config(model))))
        other.load_state_dict(model.state_dict())
        assert torch.equal(run(other, unseen), run(model, unseen))

    def test_more_bits_are_closer(self, model, unseen):
        host = NNCFHost(model, unseen)
        weight = host.reading.layers["dilated"].weight
        quantizer = next(
            q for q, (w, _) in host.reading.weights.items() if w.shape == weight.shape
        )
        errors = []
        for bits in (2, 3, 4, 6, 8):
            set_bits(quantizer, bits, weight)
            errors.append(float((quantizer.quantize(weight) - weight).norm()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.02 * errors[0]


class TestInsertion:
    def test_reads_calls_not_modules(self, odd, unseen):
        net, model = odd
        host = NNCFHost(model, unseen)
        names = [layer.name for layer in host.layers]
        assert names == [
            "stem",
            "twice/conv2d/0",
            "twice/conv2d/1",
            "/conv2d/0",
            "up",
            "line",
            "head",
        ]
        assert not host.skipped
        functional = host.reading.layers["/conv2d/0"]
        assert torch.equal(functional.weight, net.kernel)
        assert functional.operation.groups == 4
        assert functional.operation.stride == (2, 2)

    def test_full_rank_restores_odd_layers(self, odd, unseen):
        model = copy.deepcopy(odd[1])
        host = NNCFHost(model, unseen)
        seen = {}
        with torch.no_grad(), host.prepared():
            with (
                host.acting({e.name: e.weight for e in host.layers}),
                host.observe(lambda name, x, y: seen.update({name: (x, y)})),
            ):
                host.run(unseen)
        for layer in host.layers:
            adapter = Adapter.of(
                [Form.whole(32, tuple(layer.weight.shape), layer.operation.groups)],
                {"a": layer.residual},
            )
            node = host.reading.nodes[layer.name]
            branch = CoRaBranch.of(layer, node, adapter)
            x, expected = seen[layer.name]
            CoRaTap(node)(x)
            bias = expected - layer.operation(x, layer.weight)
            output = branch(layer.operation(x, layer.dequantized) + bias)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)

    def test_adapts_odd_layers(self, odd, batches, unseen):
        net, quantized = odd
        model = copy.deepcopy(quantized)
        report = apply_cora(model, batches, {"budget": 0.4})
        assert report.steps[0].kept
        assert not report.skipped
        other = load_from_config(
            copy.deepcopy(net),
            json.loads(json.dumps(get_config(model))),
            allowed_modules=("nncf.*", "cora_plugin.*"),
        )
        other.load_state_dict(model.state_dict())
        assert torch.equal(run(other, unseen), run(model, unseen))
        remove_cora(model)
        assert list(model.state_dict()) == list(quantized.state_dict())
        assert torch.equal(run(model, unseen), run(quantized, unseen))

    def test_configuration_round_trip(self, adapted_net, float_net, unseen):
        config = json.loads(json.dumps(get_config(adapted_net)))
        other = load_from_config(
            copy.deepcopy(float_net),
            config,
            allowed_modules=("nncf.*", "cora_plugin.*"),
        )
        other.load_state_dict(adapted_net.state_dict())
        assert torch.equal(run(other, unseen), run(adapted_net, unseen))

    def test_configurations_of_version_0_1_are_read(
        self, adapted_net, float_net, unseen
    ):
        config = json.loads(json.dumps(get_config(adapted_net)))
        branches = 0

        def as_it_was(value):
            nonlocal branches
            if isinstance(value, list):
                return [as_it_was(each) for each in value]
            if not isinstance(value, dict):
                return value
            value = {key: as_it_was(each) for key, each in value.items()}
            if "terms" in value:
                branches += 1
                ((term,), shape) = value.pop("terms"), value["weight_shape"]
                groups = value["operation"]["groups"]
                form = Form.read(term, tuple(shape), groups)
                kind = "full" if form.kind is Kind.WHOLE else str(form.kind)
                value |= {**term, "kind": kind, "shapes": form.shapes}
            return value

        other = load_from_config(
            copy.deepcopy(float_net),
            json.loads(json.dumps(as_it_was(config))),
            allowed_modules=("nncf.*", "cora_plugin.*"),
        )
        assert branches >= 3
        other.load_state_dict(adapted_net.state_dict())
        assert torch.equal(run(other, unseen), run(adapted_net, unseen))

    def test_factors_stand_behind_quantizers_of_their_bits(self, adapted_net):
        branches = [m for m in adapted_net.modules() if isinstance(m, CoRaBranch)]
        for branch in branches:
            for name, stored in branch.adapter.tensors.items():
                quantizer = branch.quantizers[name]
                assert isinstance(quantizer, SymmetricQuantizer)
                assert quantizer.num_bits == stored.bits == 4
                assert quantizer.per_channel == (name == "a")
                torch.testing.assert_close(
                    quantizer.quantize(getattr(branch, name)), stored.dequantize()
                )

    def test_output_quantizer_works_on_the_sum(self, odd, batches):
        model = copy.deepcopy(odd[1])
        storage = get_hook_storage(model)
        key = "twice/conv2d/0__0"
        (number,) = storage.post_hooks[key]
        apply_cora(model, batches, {"budget": 0.4})
        hooks = storage.post_hooks[key]
        assert isinstance(next(iter(hooks.values())), CoRaBranch)
        assert isinstance(list(hooks.values())[-1], BaseQuantizer)
        assert list(hooks)[-1] == number

    def test_branch_without_its_tap(self, adapted_net, unseen):
        model = copy.deepcopy(adapted_net)
        storage = get_hook_storage(model)
        for hooks in storage.pre_hooks.values():
            for number in [n for n, h in hooks.items() if isinstance(h, CoRaTap)]:
                del hooks[number]
        match = "its adapter saw no input"
        with untouched(model), pytest.raises(CoRaError, match=match):
            run(model, unseen)

    def test_a_layer_left_in_float_is_no_layer(self, float_net, dataset, unseen):
        model = nncf.quantize(
            float_net,
            dataset,
            ignored_scope=nncf.IgnoredScope(names=["same/conv2d/0"]),
        )
        assert "same" not in NNCFHost(model, unseen).reading.layers

    def test_a_disabled_quantizer_is_a_reason(self, model, unseen):
        storage = get_hook_storage(model)
        storage.pre_hooks["same/conv2d/0__1"]["0"].disable_quantization()
        host = NNCFHost(model, unseen)
        assert host.skipped == {"same": "its weight is not quantized"}

    def test_an_output_without_its_input(self, model, unseen):
        host = NNCFHost(model, unseen)
        with untouched(model), host.observe(lambda *_: None):
            hooks = get_hook_storage(model).modules()
            watches = [hook for hook in hooks if hasattr(hook, "tap")]
            assert len(watches) == len(host.layers)
            with pytest.raises(CoRaError, match="an output came without its input"):
                watches[0](unseen)


class TestFusedQuantizers:
    def test_they_are_nncfs_own_in_values_and_gradients(self, model):
        found = dict(fused_quantizers(model))
        shapes = {quantizer.scale_shape for quantizer in found}
        assert (1,) in shapes and (1, 16, 1, 1) in shapes  # of the depthwise layer
        random = torch.Generator().manual_seed(0)
        for quantizer, fused in found.items():
            low, span = range_of(quantizer)
            shares = 2 * torch.rand(64, *low.shape[1:], generator=random) - 0.5
            x = (low + shares * span).detach()
            x[0], x[1], x[2] = low, low + span, 0
            x.requires_grad_()
            slope = torch.randn(x.shape, generator=random)
            answers = fused(x), quantizer(x)
            assert torch.equal(*answers)
            gradients = [torch.autograd.grad(y, x, slope)[0] for y in answers]
            assert torch.equal(*gradients)
            assert 0.3 < gradients[0].eq(0).double().mean() < 0.7, "some are clipped"

    def test_all_that_quantize_activations_are(self, model, unseen):
        host = NNCFHost(model, unseen)
        others = {*quantizers(model).values()} - {*host.reading.weights}
        assert others == {quantizer for quantizer, _ in fused_quantizers(model)}
        before = run(model, unseen)
        with torch.no_grad(), host.prepared():
            assert torch.equal(only(host.run(unseen)), before)
        assert torch.equal(run(model, unseen), before)


class TestExtension:
    def test_compiled_once_for_a_folder(self, tmp_path, monkeypatch):
        load_extension()
        assert is_compiled()
        assert TOOLKIT.first_use() == ()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
        assert not is_compiled()
        ((notice, work),) = TOOLKIT.first_use()
        assert "C++ extension" in notice
        assert work is load_extension

    def test_stale_lock(self, tmp_path):
        import os

        lock = tmp_path / "lock"
        lock.touch()
        os.utime(lock, (0, 0))
        with pytest.raises(CoRaError, match=f"rm -rf {tmp_path}"):
            await_lock(lock)

    def test_waits_for_a_living_build(self, tmp_path):
        import threading

        lock = tmp_path / "lock"
        lock.touch()
        timer = threading.Timer(0.2, lock.unlink)
        timer.start()
        await_lock(lock, pause=0.02)
        timer.join()
        assert not lock.exists()


def test_recipe_takes_a_bare_sequential(batches):
    relu = nn.ReLU()  # It is there twice.
    net = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu).eval()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    with untouched(net):
        quantized = quantize_ptq(net, batches)
    expected = quantize_ptq(Wrapped().eval(), batches)
    images = next(iter(batches))[0]
    assert torch.equal(quantized(images), expected(images))
    report = apply_cora(quantized, batches, {"budget": 0.9}, reference=net)
    assert {row.name for row in report.layers} == {"0", "2"}


def test_recipe_refuses_a_sequential_of_another_kind(batches):
    class Other(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 1

    net = Other(nn.Conv2d(3, 4, 1))
    with untouched(net), pytest.raises(CoRaError, match=r"bare nn\.Sequential"):
        quantize_ptq(net, batches)


def test_recipe_refuses_an_unknown_range(float_net, batches):
    match = "act_range: 'best' is unknown; use one of auto, default, minmax"
    with untouched(float_net), pytest.raises(CoRaError, match=match):
        quantize_ptq(float_net, batches, act_range="best")


@pytest.mark.parametrize("bits, named", [(4, "mse"), (5, "mse"), (6, "default")])
def test_few_bits_get_ranges_of_least_error(float_net, batches, bits, named):
    found = ranges(quantize_ptq(float_net, batches, act_bits=bits))
    for each in ("mse", "default"):
        model = quantize_ptq(float_net, batches, act_bits=bits, act_range=each)
        assert (ranges(model) == found) == (each == named)


def test_ranges_of_least_error_have_less_of_it(float_net, batches):
    plain, fitted = (
        quantizers(quantize_ptq(float_net, batches, act_bits=4, act_range=each))
        for each in ("default", "mse")
    )
    x = torch.cat([images for images, _ in batches])
    model = quantize_ptq(float_net, batches, act_bits=4, first_last_bits=None)
    host, seen = NNCFHost(model, x[:1]), {}
    with torch.no_grad(), host.prepared(), host.acting(quantized=False):
        watches = [
            each.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0]})
            )
            for name, each in quantizers(model).items()
        ]
        host.run(x)
        for watch in watches:
            watch.remove()
    changed = 0
    for name, each in fitted.items():
        if range_of(each)[0].numel() > 1 or torch.equal(
            torch.stack(range_of(each)), torch.stack(range_of(plain[name]))
        ):
            continue
        changed += 1
        errors = [
            float((q.quantize(seen[name]) - seen[name]).square().sum().detach())
            for q in (each, plain[name])
        ]
        assert errors[0] < errors[1], name
    assert changed >= 4


def ranges(model):
    """The range of each quantizer, weights included."""
    found = quantizers(model).items()
    return {name: [x.tolist() for x in range_of(each)] for name, each in found}


def test_same_seed_same_adapters(quantized, dataset, unseen):
    outputs = []
    for _ in range(2):
        model = copy.deepcopy(quantized)
        CoRa(CONFIG).apply(NNCFHost(model, unseen), dataset.get_inference_data())
        outputs.append(run(model, unseen))
    assert torch.equal(*outputs)
