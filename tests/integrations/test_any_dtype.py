"""Half precision through both hosts and their files; activations that files take."""

import logging
from importlib.util import find_spec

import onnx
import onnxruntime
import pytest
import torch
from any_net import adapt, export, quantized
from torch import nn

from cora_plugin.integrations import checked
from cora_plugin.integrations.toolkit import load_toolkit

HOSTS = [host for host in ("brevitas", "nncf") if find_spec(host)]
pytestmark = pytest.mark.parametrize("host", HOSTS)


class Net(nn.Module):
    """A depthwise layer, whose activations NNCF rounds channel by channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 16, 3, 2, 1)
        self.deep = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.two = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        y = self.two(self.deep(self.one(x).relu()).relu()).relu()
        return 20 * self.head(y.mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_keeps_its_type_and_is_written(host, dtype, tmp_path, caplog):
    torch.manual_seed(1)
    data = [torch.randn(8, 3, 16, 16).to(dtype) for _ in range(6)]
    model = quantized(host, Net(), data, dtype=dtype)
    report = adapt(host, model, data)
    assert report.after.value < 0.3 * report.before.value
    floats = [p for p in model.parameters() if p.is_floating_point()]
    assert dtype in {p.dtype for p in floats}
    with torch.no_grad():
        assert model(data[0]).dtype is dtype
    if host == "nncf":
        from cora_plugin.integrations.nncf import export_program

        with torch.no_grad():
            own, found = (
                model(data[0]),
                export_program(model, data[0]).module()(data[0]),
            )
        assert found.dtype is dtype
        # NNCF counts levels in the model's type, which for bfloat16 tips many of them.
        near = 0.3 if dtype is torch.bfloat16 else 0.02
        torch.testing.assert_close(found, own, atol=near, rtol=0.02)
    caplog.set_level(logging.INFO)
    for options in ({}, {"int8_kernels": True}):
        path = tmp_path / "half.onnx"
        assert export(host, model, data[0][:1], path, **options) < 0.1
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].type == "tensor(float)"
    assert "computes in float32" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recipes_take_half_models(host, dtype):
    torch.manual_seed(1)
    data = [torch.randn(8, 3, 16, 16).to(dtype) for _ in range(4)]
    toolkit = load_toolkit(host)
    made = toolkit.quantize(Net().eval().to(dtype), data, toolkit.options())
    with torch.no_grad():
        assert made.model(data[0]).dtype is dtype
    report = adapt(host, made.model, data)
    assert report.after.value < 0.3 * report.before.value


class Moving(nn.Module):
    """Signed activations in front of a Transpose, a Reshape or a Slice."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.one = nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.two = nn.Conv2d(16, 16, 3, 1, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        y = nn.functional.leaky_relu(self.one(x), 0.1)
        n, c, h, w = y.shape
        if self.how == "shuffle":
            y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        elif self.how == "slice":
            y = torch.cat([y[:, 8:], y[:, :8]], 1)
        else:
            y = y.permute(0, 2, 3, 1)
            y = self.norm(y) if self.how == "norm" else y
            y = self.mix(y).permute(0, 3, 1, 2)
        y = nn.functional.leaky_relu(self.two(y), 0.1)
        return 20 * self.head(y.mean((2, 3)))


@pytest.mark.parametrize("how", ["shuffle", "slice", "permute", "norm"])
def test_signed_activations_in_front_of_what_moves_them(host, how, tmp_path):
    torch.manual_seed(1)
    data = [torch.randn(8, 3, 16, 16) for _ in range(4)]
    model = quantized(host, Moving(how), data, act="sym")
    adapt(host, model, data)
    forms = [{"packed": True}] if host == "brevitas" else [{}]
    for options in (*forms, {"int8_kernels": True}):
        path = tmp_path / "net.onnx"
        off = export(host, model, data[0][:1], path, **options)
        # int8 kernels clip on some processors: see docs/exports.md.
        assert off < 0.1 or options.get("int8_kernels")
        onnx.checker.check_model(onnx.load(path), full_check=True)


@pytest.mark.parametrize(
    ("release", "way_out"),
    [("1.27.0", "use onnxruntime 1.28 or newer"), ("1.28.0", "choose another format")],
)
def test_a_file_that_a_runtime_refuses_is_not_kept(
    host, release, way_out, tmp_path, monkeypatch
):
    data = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    model = quantized(host, Net(), data)
    path = tmp_path / "net.onnx"

    def refuse(*_, **__):
        raise RuntimeError("no such operator")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", refuse)
        patch.setattr(checked, "version", lambda package: release)
        match = rf"refuses the file.*no such operator; {way_out}"
        with pytest.raises(ValueError, match=match):
            export(host, model, data[0][:1], path)
        assert not path.exists()
        assert export(host, model, data[0][:1], path, check=False) is None
    assert path.exists()
