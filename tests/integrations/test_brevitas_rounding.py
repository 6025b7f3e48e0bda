"""Brevitas' int8 files: the mean error of rounding merged weights is taken back."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx_files import onnx_output, openvino_output
from uneven_net import uneven_net, without_rounding_shifts

from cora_plugin.integrations.brevitas import (
    apply_cora,
    export_onnx_qcdq,
    export_torch_qcdq,
    load_cora,
    save_cora,
)
from cora_plugin.integrations.brevitas.insert import read_correction


@pytest.fixture(scope="module")
def quantized(quantize, batches):
    return quantize(net=uneven_net(torch.cat([x for x, _ in batches])))


@pytest.fixture(scope="module")
def adapted(quantized, batches):
    model = copy.deepcopy(quantized)
    report = apply_cora(batches, model, "budget=0.3")
    assert {"depthwise", "pointwise"} <= {row.name for row in report.layers if row.rank}
    return model


@torch.no_grad()
def run(model, x):
    y = model(x)
    return getattr(y, "value", y).numpy()


def test_int8_files_are_as_near_as_their_steps_allow(adapted, unseen, tmp_path):
    path, expected = tmp_path / "net.onnx", run(adapted, unseen)
    errors = {}
    for name, model in (
        ("with", adapted),
        ("without", without_rounding_shifts(adapted)),
    ):
        export_onnx_qcdq(model, unseen, path, int8_kernels=True)
        errors[name] = [
            np.square(output(path, unseen) - expected).mean()
            for output in (onnx_output, openvino_output)
        ]
    for one, other in zip(errors["with"], errors["without"], strict=True):
        assert one < 0.1 * other


def test_they_cost_no_operator(adapted, unseen, tmp_path):
    path, counts = tmp_path / "net.onnx", []
    for model in (adapted, without_rounding_shifts(adapted)):
        export_onnx_qcdq(model, unseen, path, int8_kernels=True)
        counts.append(sorted(n.op_type for n in onnx.load(path).graph.node))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("export", "how"),
    [
        (export_onnx_qcdq, {}),
        (export_onnx_qcdq, {"packed": True}),
        (export_torch_qcdq, {}),
    ],
)
def test_nothing_else_changes(adapted, unseen, tmp_path, export, how):
    plain, files = without_rounding_shifts(adapted), []
    assert np.array_equal(run(adapted, unseen), run(plain, unseen))
    for model in (adapted, plain):
        export(model, unseen, tmp_path / "net", **how)
        files.append((tmp_path / "net").read_bytes())
    assert files[0] == files[1] or export is export_torch_qcdq
    assert len(files[0]) == len(files[1])


def test_files_of_adapters_keep_them(quantized, adapted, unseen, tmp_path):
    save_cora(tmp_path / "adapters", adapted)
    other = load_cora(tmp_path / "adapters", copy.deepcopy(quantized))
    before, after = (read_correction(e).adapters for e in (adapted, other))
    assert before.keys() == after.keys()
    files = []
    for name, adapter in before.items():
        assert torch.equal(adapter.rounding_shift, after[name].rounding_shift)
    for model in (adapted, other):
        export_onnx_qcdq(model, unseen, tmp_path / "net", int8_kernels=True)
        files.append((tmp_path / "net").read_bytes())
    assert files[0] == files[1]
