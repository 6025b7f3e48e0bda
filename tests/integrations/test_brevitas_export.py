import copy
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import replace

import brevitas.nn as qnn
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from brevitas.quant import (
    Int8WeightPerChannelFloat,
    Int32Bias,
    SignedBinaryWeightPerTensorConst,
)
from brevitas.quant.experimental.float_quant_ocp import (
    Fp8e4m3OCPWeightPerTensorFloat,
)
from brevitas.quant.experimental.mx_quant_ocp import MXInt8Weight
from brevitas.quant_tensor import QuantTensor
from brevitas_examples.imagenet_classification.ptq.learned_round_utils import (
    apply_learned_round,
)
from full_disk import full_disk
from onnx_files import onnx_output, openvino_output, operators
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model
from torch import nn
from untouched import untouched

from cora_plugin import CoRaError
from cora_plugin.integrations.brevitas import (
    BrevitasHost,
    apply_cora,
    export_onnx_qcdq,
    export_qonnx,
    export_torch_qcdq,
    remove_cora,
)
from cora_plugin.integrations.brevitas.insert import insert_correction, read_correction
from cora_plugin.layer import Correction
from cora_plugin.testing.checks import series


class Shallow(nn.Module):
    """Few layers: rounding flips no activation on the way to the output."""

    def __init__(self, groups):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, stride=2, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1, groups=groups)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.conv(x))))
        return self.head(x.mean((2, 3)))


def torch_output(model, x):
    with torch.no_grad():
        y = model(x)
    return (y.value if isinstance(y, QuantTensor) else y).numpy()


def qonnx_output(path, x):
    with pytest.MonkeyPatch.context() as patch:
        # The executor makes models as new as the onnx package, which onnxruntime lags.
        patch.setattr(onnx, "IR_VERSION", 10)
        model = cleanup_model(ModelWrapper(str(path)))
        (name,) = [each.name for each in model.graph.input]
        (answer,) = execute_onnx(model, {name: x.numpy()}).values()
    return answer


def torchscript_output(path, x):
    return torch.jit.load(path)(x).numpy()


FORMATS = {
    "onnx qcdq": (export_onnx_qcdq, onnx_output),
    "qonnx": (export_qonnx, qonnx_output),
    "torch qcdq": (export_torch_qcdq, torchscript_output),
}
every_format = pytest.mark.parametrize(
    ("export", "output"), FORMATS.values(), ids=FORMATS.keys()
)


def assert_parity(got, expected):
    """Equal, but for the rare image where one activation rounds the other way."""
    apart = np.abs(got - expected).max(1)
    assert (apart < 1e-4).mean() > 0.9
    assert apart.max() < 0.02 * np.ptp(expected)


def stored(path):
    """Number of stored values by type, in initialisers and constants."""
    graph = onnx.load(path).graph
    tensors = list(graph.initializer)
    tensors += [
        attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
    ]
    count = Counter()
    for tensor in tensors:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        count[kind] += int(np.prod(tensor.dims))
    return count


@pytest.fixture(
    params=[(1, "layerwise"), (2, "layerwise"), (24, "layerwise"), (1, "fx")]
)
def shallow(request, quantize, batches):
    """A net with adapters beside all its layers, and the report."""
    groups, backend = request.param
    torch.manual_seed(1)
    model = quantize(backend, net=Shallow(groups).eval())
    report = apply_cora(
        batches,
        model,
        {
            "ranks": {"conv": 4, "second": 4, "head": 3},
            "budget": 1,
            "adapter_bits": 8,
        },
    )
    assert all(row.rank for row in report.layers)
    return model, report


@every_format
def test_the_file_gives_the_answers_of_torch(shallow, unseen, tmp_path, export, output):
    model, _ = shallow
    export(model, unseen, tmp_path / "model")
    assert_parity(output(tmp_path / "model", unseen), torch_output(model, unseen))


@every_format
def test_adapters_of_every_kind_are_exported(
    quantize, batches, unseen, tmp_path, export, output
):
    torch.manual_seed(1)
    model = quantize(net=Shallow(24).eval(), weight_quant_type="asym")
    ranks = {"conv": 24, "second": 3, "head": 3}
    report = apply_cora(batches, model, {"ranks": ranks, "budget": 1})
    assert [row.kind for row in report.layers] == ["whole", "shared-basis", "low-rank"]
    export(model, unseen, tmp_path / "model")
    assert_parity(output(tmp_path / "model", unseen), torch_output(model, unseen))


def test_no_runtime_takes_constants_for_a_layer(quantize, batches, unseen, tmp_path):
    model = quantize(net=Shallow(24).eval())
    apply_cora(batches, model, {"ranks": {"conv": 0, "second": 3, "head": 0}})
    export_onnx_qcdq(model, unseen, tmp_path / "model")
    found = operators(onnx.load(tmp_path / "model"))
    assert found["Gemm"] == 1  # the head
    assert found["Einsum"] == 1  # the adapter's two factors


SERIES = [((2, 8), 2), (4, 2), ((2, 8), (3, 4))]
"""Steps of `series`: a rank and a whole term, two whole ones, a rank and another."""


@pytest.mark.parametrize("steps", SERIES)
@pytest.mark.parametrize("groups", [1, 2, 24])
@every_format
def test_adapters_of_two_terms_are_exported(
    quantize, unseen, tmp_path, export, output, groups, steps
):
    torch.manual_seed(1)
    model = quantize(net=Shallow(groups).eval())
    plain = torch_output(model, unseen)
    insert_correction(model, Correction(series(BrevitasHost(model), *steps)))
    expected = torch_output(model, unseen)
    assert np.abs(expected - plain).max() > 0.01 * np.ptp(expected)
    export(model, unseen, tmp_path / "model")
    assert_parity(output(tmp_path / "model", unseen), expected)


@pytest.mark.parametrize("steps", SERIES)
@pytest.mark.parametrize("groups", [1, 2, 24])
def test_adapters_of_two_terms_cost_no_kernel(
    quantize, unseen, tmp_path, groups, steps
):
    torch.manual_seed(1)
    model = quantize(net=Shallow(groups).eval())
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(model, unseen, path, int8_kernels=True)
    kinds = optimized_operators(path, tmp_path)
    insert_correction(model, Correction(series(BrevitasHost(model), *steps)))
    expected = torch_output(model, unseen)
    export_onnx_qcdq(model, unseen, path, int8_kernels=True)
    assert optimized_operators(path, tmp_path) == kinds
    # Weights are rounded to 8 bits once more.
    got = onnx_output(path, unseen)
    assert np.abs(got - expected).max() < 0.05 * np.ptp(expected)


@every_format
def test_learned_rounding_is_exported(
    quantize, batches, unseen, tmp_path, export, output
):
    torch.manual_seed(1)
    plain = quantize(net=Shallow(1).eval())
    model = copy.deepcopy(plain)
    settings = Namespace(
        learned_round="hard_sigmoid",
        learned_round_mode="layerwise",
        learned_round_loss="mse",
        learned_round_lr=1.0,
        learned_round_lr_scheduler=None,
        learned_round_iters=5,
        learned_round_batch_size=8,
    )
    apply_learned_round(model, batches[:2], settings)
    assert torch.equal(plain.second.weight, model.second.weight)
    rounded, nearest = model.second.quant_weight(), plain.second.quant_weight()
    assert (rounded.int() != nearest.int()).float().mean() > 0.02
    apply_cora(batches, model, 0.1)
    export(model, unseen, tmp_path / "model")
    assert_parity(output(tmp_path / "model", unseen), torch_output(model, unseen))


def test_weights_and_adapters_are_stored_as_integers(shallow, unseen, tmp_path):
    model, report = shallow
    export_onnx_qcdq(model, unseen[:1], tmp_path / "model.onnx")
    count = stored(tmp_path / "model.onnx")
    weights = sum(row.weights for row in report.layers)
    adapters = sum(row.parameters for row in report.layers)
    assert count["INT8"] >= weights + adapters
    # Of values in 8 bits and scales in 32, which both are parameters.
    scales = sum(row.adapter_bits - 8 * row.parameters for row in report.layers) / 24
    assert count["FLOAT"] < scales + 200  # shifts, scales of all else
    clips = [
        n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "Clip"
    ]
    assert clips


@pytest.mark.parametrize("groups", [1, 24])
def test_adapters_of_four_bits_are_packed(quantize, batches, unseen, tmp_path, groups):
    torch.manual_seed(1)
    model = quantize(net=Shallow(groups).eval())
    ranks = {"conv": 24, "second": 4, "head": 3}
    config = {"ranks": ranks, "budget": 1, "adapter_bits": 4}
    report = apply_cora(batches, model, config)
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(model, unseen, path, packed=True)
    weights = sum(row.weights for row in report.layers if row.name != "conv")
    # Parameters are values in 4 bits and scales in 32.
    adapters = sum(32 * e.parameters - e.adapter_bits for e in report.layers) / 28
    assert stored(path)["INT4"] == weights + adapters  # the first layer has 8 bits
    assert_parity(onnx_output(path, unseen), torch_output(model, unseen))


@pytest.mark.parametrize("backend", ["layerwise", "fx"])
def test_a_deeper_net_decides_as_torch_does(
    prototypes, batches, unseen, tmp_path, backend
):
    model = copy.deepcopy(prototypes[backend])
    apply_cora(batches, model, 0.3)
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(model, unseen, path)
    got, expected = onnx_output(path, unseen), torch_output(model, unseen)
    # Here and there an activation rounds the other way.
    assert np.median(np.abs(got - expected)) < 1e-4
    assert (got.argmax(1) == expected.argmax(1)).mean() > 0.95


@pytest.mark.parametrize(
    ("export", "each"),
    [(export_onnx_qcdq, 1), (export_qonnx, 4), (export_torch_qcdq, 1)],
)
def test_bytes_are_those_of_the_documents_table(export, each, quantize, tmp_path):
    data = [(x, None) for x in torch.randn(40, 256).split(10)]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    model = quantize(net=net, data=data, bias_bits=None)
    path = tmp_path / "model"
    export(model, data[0][0], path)
    plain = path.stat().st_size
    report = apply_cora(data, model, {"ranks": {"*": 64}, "budget": 0.9})
    export(model, data[0][0], path)
    weights = sum(row.weights for row in report.layers)
    adapters = path.stat().st_size - plain
    assert 1 <= plain / (each * weights) < 1.25
    assert 1 <= adapters / (each * report.adapter_parameters) < 1.25


@every_format
def test_exporting_does_not_touch_the_model(
    prototypes, batches, unseen, tmp_path, export, output
):
    model = copy.deepcopy(prototypes["fx"])
    apply_cora(batches, model, 0.3)
    model.train()
    with untouched(model):
        export(model, unseen[:1], tmp_path / "model")


@every_format
def test_a_failed_export_leaves_the_old_file_and_no_other(
    prototypes, unseen, tmp_path, export, output
):
    model, path = prototypes["layerwise"], tmp_path / "model"
    wrong = r"args: the model cannot be run .* \[64, 2, 16, 16\]: .*channels"
    with untouched(model), pytest.raises(CoRaError, match=wrong):
        export(model, unseen[:, :2], path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"old")
    with untouched(model), pytest.raises(CoRaError, match=wrong):
        export(model, unseen[:, :2], path)
    with untouched(model), full_disk(), pytest.raises(OSError):
        export(model, unseen, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    match = "nowhere does not exist"
    with untouched(model), pytest.raises(FileNotFoundError, match=match):
        export(model, unseen, tmp_path / "nowhere" / "model")


def linear(weight_quant):
    torch.manual_seed(0)
    layer = qnn.QuantLinear(32, 32, bias=True, weight_quant=weight_quant)
    return nn.Sequential(layer).eval()


@pytest.mark.parametrize(
    ("weight_quant", "export", "why"),
    [
        (MXInt8Weight, export_onnx_qcdq, "per group"),
        (MXInt8Weight, export_qonnx, "per group"),
        (MXInt8Weight, export_torch_qcdq, "per group"),
        (Fp8e4m3OCPWeightPerTensorFloat, export_onnx_qcdq, "NotImplemented"),
        (Fp8e4m3OCPWeightPerTensorFloat, export_torch_qcdq, "WeightFloatQuant"),
        (SignedBinaryWeightPerTensorConst, export_onnx_qcdq, "Binary"),
        (Int8WeightPerChannelFloat.let(bit_width=16), export_onnx_qcdq, "width 16"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_the_layer(
    weight_quant, export, why, tmp_path
):
    model = linear(weight_quant)
    data = torch.randn(40, 32).split(10)
    apply_cora(data, model, {"ranks": {"0": 4}, "budget": 1})
    match = f"^0: Brevitas cannot write its weight_quant in this format: .*{why}"
    with untouched(model), pytest.raises(CoRaError, match=match):
        export(model, data[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_operator_that_onnx_does_not_know_is_refused(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(Int8WeightPerChannelFloat)

        def forward(self, x):
            return torch.special.bessel_j0(self.layer(x))

    model, match = Odd().eval(), "cannot write the model .*bessel_j0"
    with untouched(model), pytest.raises(CoRaError, match=match):
        export_onnx_qcdq(model, torch.randn(2, 32), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_quantizer_that_an_exporter_refuses_is_named(tmp_path):
    """Others cannot be asked alone: a bias has its scale from a run."""
    torch.manual_seed(0)
    returns = {"return_quant_tensor": True}
    model = nn.Sequential(
        qnn.QuantIdentity(**returns),
        qnn.QuantConv2d(3, 8, 3, bias_quant=Int32Bias, **returns),
        qnn.QuantReLU(**returns),
        qnn.TruncAvgPool2d(2, float_to_int_impl_type="floor"),
    ).eval()
    match = "^3: Brevitas cannot write its trunc_quant in this format"
    with untouched(model), pytest.raises(CoRaError, match=match):
        export_torch_qcdq(model, torch.randn(2, 3, 8, 8), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@every_format
def test_a_bias_that_no_integer_can_hold_is_refused_by_the_layer(
    quantize, unseen, tmp_path, export, output
):
    """As a channel's that batch norm has scaled to almost nothing."""
    torch.manual_seed(1)
    net = Shallow(1).eval()
    net.second.weight.data[5] *= 1e-4
    model = quantize(net=net)
    model.second.bias.data[5] = beyond_float32(model, unseen)
    if export is export_qonnx:  # which stores floats
        export(model, unseen, tmp_path / "model")
        return
    match = r"^second: its bias .*get_submodule\(\"second\"\)\.bias_quant"
    with untouched(model), pytest.raises(CoRaError, match=match):
        export(model, unseen, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    model.get_submodule("second").bias_quant.disable_quant = True
    export(model, unseen, tmp_path / "model")
    assert_parity(output(tmp_path / "model", unseen), torch_output(model, unseen))


def test_such_a_bias_is_told_before_adapters_are_made(
    quantize, batches, unseen, caplog
):
    torch.manual_seed(1)
    model = quantize(net=Shallow(1).eval())
    apply_cora(batches, copy.deepcopy(model), {"budget": 0.3, "metric": "svd"})
    assert not [e for e in caplog.messages if "its bias" in e]
    model.second.bias.data[5] = beyond_float32(model, unseen)
    caplog.clear()
    apply_cora(batches, model, {"budget": 0.3, "metric": "svd"})
    assert caplog.messages[0].startswith("second: its bias cannot be stored as int")
    assert "bias_quant.disable_quant = True; QCDQ exports will" in caplog.messages[0]


def beyond_float32(model, x):
    """A bias of so many steps that their number times the step is a half apart."""
    seen, inner = {}, model.second.inner_forward_impl

    def observe(x, weight, bias):
        seen["step"] = bias.scale.flatten()[5]
        return inner(x, weight, bias)

    model.second.inner_forward_impl = observe
    torch_output(model, x)
    del model.second.inner_forward_impl
    steps = torch.arange(2**22, 2**23, 2, dtype=torch.float32)
    biases = steps * seen["step"]
    return biases[biases / seen["step"] != steps][0]


@pytest.mark.parametrize("export", [export_onnx_qcdq, export_qonnx])
def test_a_missing_package_is_named(prototypes, unseen, tmp_path, export, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxoptimizer", None)
    model = prototypes["layerwise"]
    match = "need onnxoptimizer; .*pip install onnxopt"
    with untouched(model), pytest.raises(CoRaError, match=match):
        export(model, unseen, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_packed_weights_need_one_package_more(
    prototypes, unseen, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    model = prototypes["layerwise"]
    export_onnx_qcdq(model, unseen, tmp_path / "plain.onnx")
    match = "need onnx_ir; .*pip install onnx_ir"
    with untouched(model), pytest.raises(CoRaError, match=match):
        export_onnx_qcdq(model, unseen, tmp_path / "x", packed=True)
    assert [file.name for file in tmp_path.iterdir()] == ["plain.onnx"]


def test_packed_weights_give_the_same_answers(shallow, unseen, tmp_path):
    model, report = shallow
    plain, packed = tmp_path / "plain.onnx", tmp_path / "packed.onnx"
    export_onnx_qcdq(model, unseen, plain)
    export_onnx_qcdq(model, unseen, packed, packed=True)
    assert_parity(onnx_output(packed, unseen), onnx_output(plain, unseen))
    count = stored(packed)
    weights = {row.name: row.weights for row in report.layers}
    # Brevitas' layerwise backend keeps the first layer at 8 bits.
    assert count["INT4"] in (sum(weights.values()), weights["second"] + weights["head"])
    assert count["INT8"] < stored(plain)["INT8"] - count["INT4"] + 100
    assert packed.stat().st_size < plain.stat().st_size - count["INT4"] // 3


def test_openvino_runs_packed_weights(shallow, unseen, tmp_path):
    model, _ = shallow
    path = tmp_path / "packed.onnx"
    export_onnx_qcdq(model, unseen, path, packed=True)
    expected = torch_output(model, unseen)
    assert_parity(openvino_output(path, unseen), expected)
    # Its own choice is bfloat16 where the processor has it.
    apart = np.abs(openvino_output(path, unseen, "PERFORMANCE") - expected)
    assert apart.max() < 0.02 * np.ptp(expected)


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_other_widths_are_stored_in_the_nearest_type(quantize, unseen, tmp_path, bits):
    model = quantize(net=Shallow(1).eval(), weight_bits=bits)
    export_onnx_qcdq(model, unseen, tmp_path / "model.onnx", packed=True)
    assert (stored(tmp_path / "model.onnx")["INT4"] > 0) == (bits <= 4)
    got = onnx_output(tmp_path / "model.onnx", unseen)
    assert_parity(got, torch_output(model, unseen))


def test_asymmetric_weights_are_stored_unsigned(quantize, unseen, tmp_path):
    model = quantize(net=Shallow(1).eval(), weight_quant_type="asym")
    for how in ({"packed": True}, {"int8_kernels": True}):
        export_onnx_qcdq(model, unseen, tmp_path / "model.onnx", **how)
        assert stored(tmp_path / "model.onnx")["UINT4"] > 24 * 24 * 9
        got = onnx_output(tmp_path / "model.onnx", unseen)
        expected = torch_output(model, unseen)
        assert np.abs(got - expected).max() < 0.02 * np.ptp(expected)


def optimized_operators(path, folder):
    """What onnxruntime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimized.onnx").graph
    return Counter(node.op_type for node in graph.node)


def test_adapters_and_shifts_cost_no_kernel(shallow, unseen, tmp_path):
    model, _ = shallow
    correction = read_correction(model)
    remove_cora(model)
    shifts = {
        name: 0.1 * torch.randn(adapter.weight_shape[0])
        for name, adapter in correction.adapters.items()
    }
    insert_correction(model, replace(correction, shifts=shifts))
    path = tmp_path / "model.onnx"
    expected = torch_output(model, unseen)
    kinds = []
    for carried in (True, False):
        export_onnx_qcdq(model, unseen, path, int8_kernels=True)
        assert stored(path)["INT4"] > 0
        if carried:
            got = onnx_output(path, unseen)
            # Weights are rounded to 8 bits once more.
            assert np.abs(got - expected).max() < 0.05 * np.ptp(expected)
            assert (got.argmax(1) == expected.argmax(1)).mean() > 0.95
        kinds.append(optimized_operators(path, tmp_path))
        remove_cora(model)
    assert kinds[0] == kinds[1]
    # Both backends leave something before the mean over positions float.
    assert kinds[0]["QLinearConv"] >= 1


def test_residual_sums_run_in_int8_kernels(prototypes, batches, unseen, tmp_path):
    """Which Brevitas' layerwise backend rounds only for the layers that read them."""
    model = copy.deepcopy(prototypes["layerwise"])
    apply_cora(batches, model, 0.3)
    path = tmp_path / "model.onnx"
    export_onnx_qcdq(model, unseen, path, int8_kernels=True)
    assert "QLinearAdd" in optimized_operators(path, tmp_path)
    expected = torch_output(model, unseen)
    for got in onnx_output(path, unseen), openvino_output(path, unseen):
        assert np.abs(got - expected).max() < 0.05 * np.ptp(expected)
        assert (got.argmax(1) == expected.argmax(1)).mean() > 0.95


@pytest.mark.parametrize("how", [{"opset_version": 17}, {"dynamo": True}])
def test_options_that_contradict_each_other(prototypes, unseen, tmp_path, how):
    model, match = prototypes["layerwise"], f"{next(iter(how))}=.*leave"
    with untouched(model), pytest.raises(CoRaError, match=match):
        export_onnx_qcdq(model, unseen, tmp_path / "m.onnx", packed=True, **how)
    assert not list(tmp_path.iterdir())
