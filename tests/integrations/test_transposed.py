"""Transposed convolutions through every file of both hosts."""

import copy
from importlib.util import find_spec

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from any_net import adapt, quantized
from torch import nn

from cora_plugin.layer import Correction
from cora_plugin.testing import images, net_of
from cora_plugin.testing.checks import series

HOSTS = [host for host in ("brevitas", "nncf") if find_spec(host)]
each_host = pytest.mark.parametrize("host", HOSTS)

CALLS = list(images(64, seed=2).split(16))
UNSEEN = images(8, seed=3)
KINDS = ("transposed", "output padding", "grouped transposed", "depthwise transposed")


def host_of(host, model):
    if host == "brevitas":
        from cora_plugin.integrations.brevitas import BrevitasHost

        return BrevitasHost(model)
    from cora_plugin.integrations.nncf import NNCFHost

    return NNCFHost(model, CALLS[0])


@pytest.fixture(scope="module")
def adapted():
    """Models with an adapter of two terms beside every layer, made once."""
    made = {}

    def model(host, kind):
        if (host, kind) not in made:
            net = quantized(host, net_of(kind), CALLS)
            inside = host_of(host, net)
            with inside.prepared():
                inside.correct(Correction(series(inside, (2, 8), 4)))
            made[host, kind] = net
        return copy.deepcopy(made[host, kind])

    return model


@torch.no_grad()
def answer(model):
    y = model(UNSEEN)
    return getattr(y, "value", y)


def near(path, expected, share):
    session = onnxruntime.InferenceSession(path)
    (name,) = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {name: UNSEEN.numpy()})
    far = np.abs(found - expected.numpy()).max()
    assert far < share * np.abs(expected.numpy()).max()


@each_host
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["plain", "packed", "int8_kernels"])
def test_onnx_files_agree_with_torch(host, kind, form, adapted, tmp_path):
    model = adapted(host, kind)
    path = tmp_path / "net.onnx"
    options = {} if form == "plain" else {form: True}
    if host == "brevitas":
        from cora_plugin.integrations.brevitas import export_onnx_qcdq

        if form != "plain":
            axes = {"x": {0: "n"}, "y": {0: "n"}}
            options |= {"input_names": ["x"], "output_names": ["y"]}
            options["dynamic_axes"] = axes
        export_onnx_qcdq(model, UNSEEN, path, **options)
    else:
        if form == "packed":
            pytest.skip("NNCF's files are packed as they are")
        from cora_plugin.integrations.nncf import export_onnx

        export_onnx(model, UNSEEN, path, **options)
    near(path, answer(model), 0.1 if form == "int8_kernels" else 0.03)
    graph = onnx.load(path).graph
    layers = [n for n in graph.node if n.op_type == "ConvTranspose"]
    # Folded, there is the layer alone; else also the filters of both terms.
    assert len(layers) == (1 if form == "int8_kernels" else 3)


@pytest.mark.skipif("brevitas" not in HOSTS, reason="Brevitas is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_torchscript_agrees_with_torch(kind, adapted, tmp_path):
    from cora_plugin.integrations.brevitas import export_torch_qcdq

    model = adapted("brevitas", kind)
    expected = answer(model)
    far = export_torch_qcdq(model, UNSEEN, tmp_path / "net.pt")
    assert far < 1e-4 * expected.abs().max()


@pytest.mark.skipif("brevitas" not in HOSTS, reason="Brevitas is not installed")
def test_qonnx_is_written(adapted, tmp_path):
    from cora_plugin.integrations.brevitas import export_qonnx

    export_qonnx(adapted("brevitas", "transposed"), UNSEEN, tmp_path / "net.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))


@pytest.mark.skipif("nncf" not in HOSTS, reason="NNCF is not installed")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("int8_kernels", [False, True])
def test_ir_agrees_with_torch(kind, int8_kernels, adapted, tmp_path):
    from cora_plugin.integrations.nncf import export_openvino

    model = adapted("nncf", kind)
    expected = answer(model)
    path = tmp_path / "net.xml"
    far = export_openvino(model, UNSEEN, path, int8_kernels=int8_kernels)
    assert far < (0.1 if int8_kernels else 0.03) * expected.abs().max()


@each_host
def test_macs_are_counted_where_filters_are_applied(host):
    # The transposed layer has 8×8 inputs an image and 16×16 outputs.
    model = quantized(host, net_of("transposed"), CALLS)
    report = adapt(host, model, CALLS, {"budget": "0.5 macs", "ranks": {"layer": 3}})
    (row,) = [row for row in report.layers if row.name == "layer"]
    assert row.macs == 3 * 12 * 16 * 64 + 3 * 12 * 256


@pytest.mark.skipif("brevitas" not in HOSTS, reason="Brevitas is not installed")
def test_an_output_size_of_its_own_leaves_the_layer_alone():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.down = nn.Conv2d(3, 12, 3, stride=2, padding=1)
            self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, padding=1)
            self.head = nn.Linear(8, 10)

        def forward(self, x):
            y = self.down(x).relu()
            y = self.up(y, output_size=x.shape[2:]).relu()
            return 6 * self.head(y.mean((2, 3)))

    model = quantized("brevitas", Sized(), CALLS)
    report = adapt("brevitas", model, CALLS)
    assert "output_size" in report.skipped["up"]
    assert report.after.value < report.before.value
