"""NNCF models with adapters outside of NNCF: OpenVINO, ONNX Runtime, torch.export."""

import copy
import stat
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from full_disk import full_disk
from onnx import TensorProto
from onnx_files import onnx_output, openvino_output, operators
from untouched import untouched

from cora_plugin import CoRaError
from cora_plugin.integrations.nncf import (
    NNCFHost,
    apply_cora,
    export_onnx,
    export_openvino,
    export_program,
    quantize_ptq,
)
from cora_plugin.integrations.nncf.qdq import Grid
from cora_plugin.layer import Correction
from cora_plugin.testing.checks import series

RANKS = {"reflect": 2, "depthwise": 4, "pointwise": 4, "head": 3}
CONFIG = {"budget": 0.9, "ranks": RANKS}


@pytest.fixture(scope="module", params=[8, 4, 2])
def adapted(request, float_net, batches, unseen):
    """The net at a bit width, with adapters, and their average effect."""
    model = quantize_ptq(
        float_net, batches, request.param, depthwise_bits=None, first_last_bits=None
    )
    plain = run(model, unseen)
    report = apply_cora(model, batches, CONFIG)
    assert report.steps[0].kept
    return model, np.abs(run(model, unseen) - plain).mean()


@pytest.fixture(scope="module")
def low(float_net, batches):
    model = quantize_ptq(float_net, batches)
    apply_cora(model, batches, CONFIG | {"adapter_bits": 8})
    return model


@torch.no_grad()
def run(model, x):
    return model(x).numpy()


def assert_close(output, expected, effect):
    """Equal but for rounding, which may tip a few activations to the next level.

    A missing or wrong adapter would be off by its effect.
    """
    assert np.abs(output - expected).mean() < 0.1 * effect
    assert np.abs(output - expected).max() < 0.02 * np.abs(expected).max()


def assert_near(output, expected, effect):
    """Equal but for what takes from adapters of 8-bit weights most that they give."""
    limit = max(0.5 * effect, 0.01 * np.abs(expected).mean())
    assert np.abs(output - expected).mean() < limit
    assert (output.argmax(1) == expected.argmax(1)).mean() > 0.9


def integers(path):
    """The weights of an IR by type and shape."""
    found = {}
    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant" and node.get_byte_size() > 8:
            key = tuple(node.get_output_shape(0))
            found.setdefault(key, set()).add(node.get_element_type().get_type_name())
    return found


def test_openvino_computes_the_same(adapted, unseen, tmp_path):
    model, effect = adapted
    path = tmp_path / "net.xml"
    export_openvino(model, unseen[:2], path, compress_to_fp16=False)
    assert_close(openvino_output(path, unseen), run(model, unseen), effect)


def test_weights_beyond_a_clipped_range_are_the_models(
    float_net, batches, unseen, tmp_path
):
    """Integers from -7 to 7, where NNCF traces its quantizers as from -8."""
    model = quantize_ptq(float_net, batches, weight_quantile=0.2, first_last_bits=None)
    path = tmp_path / "net.xml"
    export_openvino(model, unseen[:2], path)
    checked = 0
    for node in openvino.Core().read_model(path).get_ops():
        if node.get_element_type().get_type_name() == "i4":
            levels = node.get_data(dtype=np.float32)
            assert levels.min() == -7 and levels.max() == 7
            checked += 1
    assert checked == 6
    difference = np.abs(openvino_output(path, unseen) - run(model, unseen))
    assert difference.mean() < 0.01 * np.abs(run(model, unseen)).mean()


def test_onnx_computes_the_same(adapted, unseen, tmp_path):
    model, effect = adapted
    path = tmp_path / "net.onnx"
    export_onnx(model, unseen[:2], path)
    expected = run(model, unseen)
    assert_close(onnx_output(path, unseen), expected, effect)
    assert_close(openvino_output(path, unseen), expected, effect)


@pytest.mark.parametrize("export", [export_openvino, export_onnx])
def test_openvino_runs_in_the_precision_it_chooses(export, adapted, unseen, tmp_path):
    """That is bfloat16 where the processor has it."""
    model, effect = adapted
    path = tmp_path / ("net.xml" if export is export_openvino else "net.onnx")
    export(model, unseen[:2], path)
    output = openvino_output(path, unseen, "PERFORMANCE")
    assert_near(output, run(model, unseen), effect)


def test_torch_export_computes_the_same(adapted, unseen):
    model, effect = adapted
    program = export_program(model, unseen)
    assert_close(run(program.module(), unseen), run(model, unseen), effect)


def test_ir_stores_packed_integers(low, unseen, tmp_path):
    path = tmp_path / "net.xml"
    export_openvino(low, unseen[:2], path)
    stored = integers(path)
    assert stored[16, 16, 3, 3] == {"i4"}  # reflect
    assert stored[16, 1, 3, 3] == {"i8"}  # depthwise
    assert stored[4, 9] == stored[16, 4] == {"i8"}  # its factors
    assert stored[4, 16, 1, 1] == stored[32, 4, 1, 1] == {"i8"}  # pointwise's
    assert stored[3, 32] == stored[10, 3] == {"i8"}  # head's
    same = openvino_output(path, unseen).argmax(1) == run(low, unseen).argmax(1)
    assert same.mean() > 0.95


def test_few_bits_are_stored_in_four(float_net, batches, unseen, tmp_path):
    model = quantize_ptq(float_net, batches, 3)
    export_openvino(model, unseen[:2], tmp_path / "net.xml")
    assert integers(tmp_path / "net.xml")[16, 16, 3, 3] == {"i4"}


def test_onnx_stores_packed_integers(low, unseen, tmp_path):
    path = tmp_path / "net.onnx"
    export_onnx(low, unseen[:2], path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    assert model.opset_import[0].version == 21
    stored = {}
    for tensor in model.graph.initializer:
        stored.setdefault(tuple(tensor.dims), set()).add(tensor.data_type)
    assert stored[16, 16, 3, 3] == {TensorProto.INT4}
    assert stored[16, 1, 3, 3] == {TensorProto.INT8}
    assert stored[4, 9] == stored[16, 4] == {TensorProto.INT8}
    raw = [t for t in model.graph.initializer if tuple(t.dims) == (16, 16, 3, 3)]
    assert len(raw[0].raw_data) == 16 * 16 * 9 // 2


def test_adapters_of_four_bits_are_packed(float_net, batches, unseen, tmp_path):
    model = quantize_ptq(float_net, batches)
    plain = run(model, unseen)
    apply_cora(model, batches, CONFIG)
    expected = run(model, unseen)
    effect = np.abs(expected - plain).mean()
    export_onnx(model, unseen[:2], tmp_path / "net.onnx")
    kinds = {
        tuple(tensor.dims): tensor.data_type
        for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    assert kinds[4, 9] == kinds[16, 4] == TensorProto.INT4  # depthwise's factors
    assert_close(onnx_output(tmp_path / "net.onnx", unseen), expected, effect)
    export_openvino(model, unseen[:2], tmp_path / "net.xml", compress_to_fp16=False)
    assert integers(tmp_path / "net.xml")[16, 4] == {"i4"}
    assert_close(openvino_output(tmp_path / "net.xml", unseen), expected, effect)


@pytest.mark.parametrize("steps", [((2, 8), 2), (4, 2), ((2, 8), (2, 4))])
def test_adapters_of_two_terms_are_exported(
    steps, float_net, batches, unseen, tmp_path
):
    model = quantize_ptq(float_net, batches, depthwise_bits=None, first_last_bits=None)
    plain = run(model, unseen)
    before = {}
    for how in (False, True):
        export_onnx(model, unseen[:2], tmp_path / "net.onnx", int8_kernels=how)
        before[how] = operators(onnx.load(tmp_path / "net.onnx"))
    host = NNCFHost(model, unseen)
    host.correct(Correction(series(host, *steps)))
    expected = run(model, unseen)
    effect = np.abs(expected - plain).mean()
    export_onnx(model, unseen[:2], tmp_path / "net.onnx")
    found = operators(onnx.load(tmp_path / "net.onnx"))
    assert found["Conv"] > before[False]["Conv"]
    assert_close(onnx_output(tmp_path / "net.onnx", unseen), expected, effect)
    export_openvino(model, unseen[:2], tmp_path / "net.xml", compress_to_fp16=False)
    assert_close(openvino_output(tmp_path / "net.xml", unseen), expected, effect)
    program = export_program(model, unseen)
    assert_close(run(program.module(), unseen), expected, effect)
    export_onnx(model, unseen[:2], tmp_path / "net.onnx", int8_kernels=True)
    found = operators(onnx.load(tmp_path / "net.onnx"))
    assert found["Conv"] == before[True]["Conv"]
    assert_near(onnx_output(tmp_path / "net.onnx", unseen), expected, effect)


def test_onnx_takes_any_batch_size(low, unseen, tmp_path):
    export_onnx(low, unseen[:2], tmp_path / "net.onnx")
    outputs = [onnx_output(tmp_path / "net.onnx", unseen[:n]) for n in (1, 5)]
    np.testing.assert_allclose(outputs[0], outputs[1][:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("export", [export_openvino, export_onnx])
def test_the_model_is_not_touched(export, low, unseen, tmp_path):
    model = copy.deepcopy(low).train()
    suffix = "xml" if export is export_openvino else "onnx"
    with untouched(model):
        export(model, unseen[:2], tmp_path / f"net.{suffix}")


@pytest.mark.parametrize("suffix", ["xml", "onnx"])
def test_what_was_there_survives_a_failure(suffix, low, tmp_path):
    export = export_openvino if suffix == "xml" else export_onnx
    files = [tmp_path / "net.xml", tmp_path / "net.bin"]
    if suffix == "onnx":
        files = [tmp_path / "net.onnx"]
    for file in files:
        file.write_text("old")
    match = "expected input.* to have 3 channels"
    with untouched(low), pytest.raises(Exception, match=match):
        export(low, torch.zeros(1, 5, 16, 16), files[0])
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert {file.read_text() for file in files} == {"old"}


def kernels(path):
    """Convolutions and matrix products in OpenVINO, by their kernels' last word."""
    compiled = openvino.Core().compile_model(path, "CPU")
    found = Counter()
    for node in compiled.get_runtime_model().get_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        if info["layerType"] in ("Convolution", "FullyConnected", "MatMul"):
            found[info["primitiveType"].lower().rsplit("_", 1)[-1]] += 1
    return found


def test_int8_kernels_compute_nearly_the_same(adapted, unseen, tmp_path):
    model, effect = adapted
    path = tmp_path / "net.onnx"
    export_onnx(model, unseen[:2], path, int8_kernels=True)
    export_openvino(model, unseen[:2], tmp_path / "net.xml", int8_kernels=True)
    # Weights are rounded to 8 bits once more.
    for output in (
        onnx_output(path, unseen),
        openvino_output(tmp_path / "net.xml", unseen),
    ):
        assert_near(output, run(model, unseen), effect)


def test_adapters_cost_no_kernel(float_net, low, batches, unseen, tmp_path):
    counts = []
    for model in (quantize_ptq(float_net, batches), low):
        path = tmp_path / "net.onnx"
        export_onnx(model, unseen[:2], path, int8_kernels=True)
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / "optimized.onnx").graph
        kinds = [node.op_type for node in graph.node]
        counts.append(Counter(k for k in kinds if "Conv" in k or "Gemm" in k))
        export_openvino(model, unseen[:2], tmp_path / "net.xml", int8_kernels=True)
        counts.append(kernels(path) + kernels(tmp_path / "net.xml"))
    plain, plain_openvino, adapted, adapted_openvino = counts
    assert adapted == plain
    assert adapted["QLinearConv"] >= 4 and adapted["QGemm"] == 1
    assert adapted_openvino == plain_openvino
    # Six convolutions and the head, from two files.
    assert adapted_openvino["i8"] >= 12


@pytest.mark.parametrize("suffix", ["xml", "onnx"])
def test_a_full_disk(suffix, low, unseen, tmp_path):
    export = export_openvino if suffix == "xml" else export_onnx
    with untouched(low), full_disk(2000), pytest.raises(OSError):
        export(low, unseen[:2], tmp_path / f"net.{suffix}")
    assert not list(tmp_path.iterdir())


def test_missing_packages(low, unseen, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    match = "needs onnx_ir.*pip install onnx_ir"
    with untouched(low), pytest.raises(CoRaError, match=match):
        export_onnx(low, unseen[:2], tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    match = "needs onnx,.*pip install onnx$"
    with untouched(low), pytest.raises(CoRaError, match=match):
        export_onnx(low, unseen[:2], tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with untouched(low), pytest.raises(CoRaError, match="pip install openvino"):
        export_openvino(low, unseen[:2], tmp_path / "net.xml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["xml", "onnx"])
def test_writes_nothing_but_its_files(suffix, low, unseen, tmp_path):
    export = export_openvino if suffix == "xml" else export_onnx
    export(low, unseen[:2], tmp_path / f"net.{suffix}")
    names = ["net.bin", "net.xml"] if suffix == "xml" else ["net.onnx"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o444


def test_ir_has_an_xml(low, unseen, tmp_path):
    with untouched(low), pytest.raises(CoRaError, match=r"name the \.xml file"):
        export_openvino(low, unseen[:2], tmp_path / "net.bin")


def test_a_missing_folder(low, unseen, tmp_path):
    with untouched(low), pytest.raises(FileNotFoundError, match="does not exist"):
        export_onnx(low, unseen[:2], tmp_path / "none" / "net.onnx")


@pytest.mark.parametrize("export", [export_openvino, export_onnx])
def test_refuses_a_float_model(export, float_net, unseen, tmp_path):
    match = "not quantized by NNCF"
    with untouched(float_net), pytest.raises(CoRaError, match=match):
        export(float_net, unseen[:2], tmp_path / "net.xml")


@pytest.mark.parametrize(
    ("low", "high", "levels", "expected"),
    [
        # symmetric, narrow: from -7 to 7
        (-0.7, 0.7, 15, (-7, 7, 4, True)),
        # symmetric: from -8 to 7
        (-0.8, 0.7, 16, (-8, 7, 4, True)),
        (-12.8, 12.7, 256, (-128, 127, 8, True)),
        # unsigned
        (0.0, 25.5, 256, (0, 255, 8, False)),
        # asymmetric: counts from zero
        (-0.3, 1.2, 16, (0, 15, 4, False)),
        (-0.2, 0.1, 4, (-2, 1, 4, True)),
    ],
)
def test_grid(low, high, levels, expected):
    grid = Grid.of(np.array(low), np.array(high), levels)
    assert (grid.low, grid.high, grid.width, grid.signed) == expected
    values = np.linspace(low, high, levels)
    integers = grid.integers(values)
    assert list(integers) == list(range(grid.low, grid.high + 1))
    restored = (integers - grid.zero_point) * grid.scale
    np.testing.assert_allclose(restored, values, atol=1e-12)
