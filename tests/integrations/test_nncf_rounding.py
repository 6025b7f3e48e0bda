"""NNCF's int8 files: the mean error of rounding merged weights is taken back."""

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from nncf.torch import get_config, load_from_config
from onnx_files import onnx_output, openvino_output
from uneven_net import uneven_net, without_rounding_shifts

from cora_plugin.integrations.nncf import (
    apply_cora,
    export_onnx,
    export_openvino,
    export_program,
    load_cora,
    quantize_ptq,
    save_cora,
)
from cora_plugin.integrations.nncf.insert import read_adapters


@pytest.fixture(scope="module")
def net(batches):
    return uneven_net(torch.cat([x for x, _ in batches]))


@pytest.fixture(scope="module")
def quantized(net, batches):
    return quantize_ptq(net, batches, depthwise_bits=None, first_last_bits=None)


@pytest.fixture(scope="module")
def adapted(quantized, batches):
    model = copy.deepcopy(quantized)
    report = apply_cora(model, batches, "budget=0.3")
    assert {"depthwise", "pointwise"} <= {row.name for row in report.layers if row.rank}
    return model


@torch.no_grad()
def run(model, x):
    return model(x).numpy()


def test_int8_files_are_as_near_as_their_steps_allow(adapted, unseen, tmp_path):
    expected, errors = run(adapted, unseen), {}
    for name, model in (
        ("with", adapted),
        ("without", without_rounding_shifts(adapted)),
    ):
        onnx_path, ir_path = tmp_path / "net.onnx", tmp_path / "net.xml"
        export_onnx(model, unseen[:2], onnx_path, int8_kernels=True)
        export_openvino(model, unseen[:2], ir_path, int8_kernels=True)
        errors[name] = [
            np.square(output(path, unseen) - expected).mean()
            for output, path in (
                (onnx_output, onnx_path),
                (openvino_output, onnx_path),
                (openvino_output, ir_path),
            )
        ]
    for one, other in zip(errors["with"], errors["without"], strict=True):
        assert one < 0.05 * other


def test_they_cost_no_operator(adapted, unseen, tmp_path):
    path, counts = tmp_path / "net.onnx", []
    for model in (adapted, without_rounding_shifts(adapted)):
        export_onnx(model, unseen[:2], path, int8_kernels=True)
        counts.append(sorted(n.op_type for n in onnx.load(path).graph.node))
    assert counts[0] == counts[1]


def test_nothing_else_changes(adapted, unseen, tmp_path):
    plain, files = without_rounding_shifts(adapted), []
    assert np.array_equal(run(adapted, unseen), run(plain, unseen))
    for model in (adapted, plain):
        export_onnx(model, unseen[:2], tmp_path / "net.onnx")
        export_openvino(model, unseen[:2], tmp_path / "net.xml")
        ends = "onnx", "bin"
        files.append([(tmp_path / f"net.{end}").read_bytes() for end in ends])
    assert files[0] == files[1]
    programs = [export_program(model, unseen[:2]) for model in (adapted, plain)]
    assert programs[0].state_dict.keys() == programs[1].state_dict.keys()


def test_files_of_adapters_keep_them(quantized, adapted, unseen, tmp_path):
    save_cora(tmp_path / "adapters", adapted)
    other = load_cora(tmp_path / "adapters", copy.deepcopy(quantized), unseen[:2])
    assert_same_shifts(adapted, other)


def test_configurations_keep_them(net, adapted):
    config = json.loads(json.dumps(get_config(adapted)))
    allowed = ("nncf.*", "cora_plugin.*")
    other = load_from_config(copy.deepcopy(net), config, allowed_modules=allowed)
    other.load_state_dict(adapted.state_dict())
    assert_same_shifts(adapted, other)


def assert_same_shifts(model, other):
    before, after = read_adapters(model), read_adapters(other)
    assert before.keys() == after.keys()
    for name, adapter in before.items():
        assert adapter.rounding_shift.any()
        assert torch.equal(adapter.rounding_shift, after[name].rounding_shift)
