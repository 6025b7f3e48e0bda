"""Nets written by hand in brevitas.nn: QuantTensors, A2Q, pruning, subclasses."""

import brevitas.nn as qnn
import onnx
import pytest
import torch
from any_net import by_brevitas
from brevitas.graph.calibrate import calibration_mode
from brevitas.quant import (
    Int8AccumulatorAwareWeightQuant,
    Int8AccumulatorAwareZeroCenterWeightQuant,
    Int8WeightPerTensorFloat,
    Int32Bias,
)
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from cora_plugin import CoRaError
from cora_plugin.host import LEFT_FLOAT
from cora_plugin.integrations.brevitas import (
    BrevitasHost,
    apply_cora,
    cora_mode,
    export_onnx_qcdq,
    export_qonnx,
    quantize_ptq,
    remove_cora,
)


def value(y):
    return getattr(y, "value", y)


class Mine(qnn.QuantConv2d):
    """A subclass that runs as a QuantConv2d does."""


class Own(qnn.QuantConv2d):
    """One that does not."""

    def inner_forward_impl(self, x, weight, bias):
        return super().inner_forward_impl(x, weight, bias)


class Net(nn.Module):
    """Two convolutions between which QuantTensors flow, and a head."""

    def __init__(self, between="act", second=qnn.QuantConv2d, bias=Int32Bias, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        options = {
            "padding": 1,
            "weight_bit_width": 4,
            "weight_quant": Int8WeightPerTensorFloat,
            "bias_quant": bias,
            "return_quant_tensor": True,
            **kwargs,
        }
        self.between = between
        self.inp = qnn.QuantIdentity(bit_width=8, return_quant_tensor=True)
        self.one = qnn.QuantConv2d(3, 16, 3, **options)
        self.act = qnn.QuantReLU(bit_width=8, return_quant_tensor=True)
        if between == "pool":
            self.pool = qnn.TruncAvgPool2d(
                kernel_size=2, bit_width=8, float_to_int_impl_type="floor"
            )
        self.two = second(16, 16, 3, **options)
        self.last = qnn.QuantReLU(bit_width=8)
        self.head = qnn.QuantLinear(16, 10, bias=True, weight_bit_width=8)

    def forward(self, x):
        y = self.one(self.inp(x))
        if self.between in ("act", "pool"):
            y = self.act(y if self.between == "act" else self.pool(y))
        return 20 * self.head(self.last(self.two(y)).mean((2, 3)))


torch.manual_seed(1)
X = [torch.randn(8, 3, 16, 16) for _ in range(6)]


def calibrated(net):
    with torch.no_grad(), calibration_mode(net):
        for x in X:
            net(x)
    return net.eval()


@pytest.mark.parametrize("between", ["act", "nothing", "pool"])
def test_layers_behind_an_adapter_have_the_scale_that_they_need(between, tmp_path):
    net = calibrated(Net(between))
    with torch.no_grad():
        before = value(net(X[0]))
    report = apply_cora(X, net, "budget=0.3")
    assert {row.name for row in report.layers if row.rank} >= {"one", "head"}
    assert report.after.value < report.before.value
    assert export_onnx_qcdq(net, X[0][:1], tmp_path / "net.onnx") < 0.05
    remove_cora(net)
    with torch.no_grad():
        assert torch.equal(value(net(X[0])), before)


@pytest.mark.parametrize(
    "quantizer",
    [Int8AccumulatorAwareWeightQuant, Int8AccumulatorAwareZeroCenterWeightQuant],
)
def test_weight_quantizers_that_need_their_input_see_the_first_batch(
    quantizer, tmp_path
):
    def net():
        options = {"weight_quant": quantizer, "weight_accumulator_bit_width": 16}
        return calibrated(Net(bias=None, **options))

    model = net()
    report = apply_cora(iter(X), model, "budget=0.3")
    assert not report.skipped and report.images + report.held_out == 48
    assert report.after.value < 0.5 * report.before.value
    path = tmp_path / "net.onnx"
    assert export_onnx_qcdq(model, X[0], path) < 0.02
    export_qonnx(model, X[0], path)  # Their rounding has no name there.
    quantizers = [n for n in onnx.load(path).graph.node if n.op_type == "Quant"]
    assert len(quantizers) > 4
    # Their widths are planned like any other's.
    model = net()
    narrow = {"budget": "0.85 ptq", "menu": [3, 4, 5, 6, 8]}
    report = apply_cora(X, model, narrow)
    assert (
        report.plan["layer_bits"] and report.equivalent_bits <= report.plan["allowed"]
    )
    assert report.after.value < report.before.value
    assert export_onnx_qcdq(model, X[0], path) < 0.02
    # Without a loader there is none to see.
    model = net()
    with torch.no_grad(), cora_mode(model, "budget=0.3") as cora:
        for x in X:
            cora.model(x)
    assert "goes by the layer's input" in cora.report.skipped["two"]
    assert [row.name for row in cora.report.layers] == ["head"]


def test_layers_in_float_are_listed():
    net = nn.Sequential(
        qnn.QuantConv2d(3, 8, 3, weight_bit_width=3), nn.Conv2d(8, 4, 1)
    )
    report = apply_cora(X, calibrated(net), {"budget": 0.5, "objective": "mse"})
    assert report.skipped == {"1": LEFT_FLOAT}
    assert report.after.value < report.before.value


def test_a_model_that_never_ran_is_written(tmp_path):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 8, 3)
            self.unused = nn.Linear(8, 3)

        def forward(self, x):
            return self.one(x).relu()

    model = by_brevitas(Unused(), X, 4, torch.float32, "asym", scales="mse")
    assert export_onnx_qcdq(model, X[0], tmp_path / "net.onnx") < 0.02


def test_a_subclass_carries_adapters_where_it_runs_as_its_base():
    net = calibrated(Net(second=Mine))
    report = apply_cora(X, net, "budget=0.3")
    assert not report.skipped
    assert type(net.two).__name__ == "CoRaMine"
    assert type(remove_cora(net).two) is Mine
    report = apply_cora(X, calibrated(Net(second=Own)), "budget=0.3")
    assert report.skipped == {"two": "Own is not supported"}


def test_a_pruned_layer_is_restored_to_its_pruned_weight():
    net = calibrated(Net())
    for layer in (net.one, net.two):
        prune.l1_unstructured(layer, "weight", 0.8)
    net(X[0])
    host = BrevitasHost(net)
    for layer in host.layers[:2]:
        assert float((layer.weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    report = apply_cora(X, net, "budget=0.3")
    assert report.after.value < 0.5 * report.before.value
    with pytest.raises(CoRaError, match=r"prune\.remove"):
        other = calibrated(Net())
        prune.l1_unstructured(other.two, "weight", 0.8)
        other(X[0])
        apply_cora(X, other, {"budget": 0.3, "alternations": 2})


def test_a_parametrization_whose_state_brevitas_loses_is_told_with_the_way_out():
    net = nn.Sequential(orthogonal(nn.Conv2d(3, 8, 3, bias=False))).eval()
    model = by_brevitas(net, X, 4, torch.float32, "sym")
    with pytest.raises(CoRaError, match=r"^0: .*remove_parametrizations\(model\.0, "):
        apply_cora(X, model, "budget=0.3")


WRAPS = [weight_norm, old_weight_norm, spectral_norm, orthogonal]


@pytest.mark.parametrize("wrap", WRAPS)
def test_computed_weights_are_stored_by_the_recipe(wrap):
    torch.manual_seed(0)
    net = nn.Sequential(
        wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Flatten(), wrap(nn.Linear(800, 4))
    ).eval()
    batches = [torch.randn(8, 3, 12, 12) for _ in range(4)]
    with torch.no_grad():
        expected = net(batches[0])
    model = quantize_ptq(net, batches)
    report = apply_cora(batches, model, "budget=0.2")
    assert [layer.name for layer in report.layers] == ["0", "3"]
    with torch.no_grad():
        error = (model(batches[0]) - expected).square().mean()
    assert error < 0.01 * expected.square().mean()
