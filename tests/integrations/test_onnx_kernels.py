"""Rewritten ONNX graphs compute what they computed, in fewer or in integer layers."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnx_files import SATURATES, operators
from onnx_net import RANDOM, Net, assert_same, normal, rewritten, run

from cora_plugin.integrations.onnx.affine import absorb_affine
from cora_plugin.integrations.onnx.constants import constants_by_arithmetic
from cora_plugin.integrations.onnx.fold import fold_branches
from cora_plugin.integrations.onnx.graph import Graph, known, producer
from cora_plugin.integrations.onnx.int8 import for_int8_kernels
from cora_plugin.integrations.onnx.moving import (
    round_after_moving,
    round_before_moving,
)
from cora_plugin.integrations.onnx.packed import pack_weights
from cora_plugin.integrations.onnx.padding import absorb_padding
from cora_plugin.integrations.onnx.steps import merge_steps
from cora_plugin.integrations.onnx.sums import round_sums


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order():
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def convolution(groups=1, rank=3, full=False, **sliding):
    net = Net(8, 9, 9)
    y = net("Conv", "x", normal(12, 8 // groups, 3, 3), normal(12), **sliding)
    if full:
        share = net("Conv", "x", normal(12, 8 // groups, 3, 3), **sliding)
    else:
        a = net("Conv", "x", normal(groups * rank, 8 // groups, 3, 3), **sliding)
        share = net("Conv", a, normal(12, rank, 1, 1), group=groups)
    net("Relu", net("Add", share, y))
    return net.model()


@pytest.mark.parametrize(
    "model",
    [
        convolution(pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        convolution(strides=[2, 2], dilations=[2, 2]),
        convolution(groups=2, group=2),
        convolution(full=True, group=1),
        convolution(groups=4, full=True, group=4),
    ],
)
def test_a_branch_is_folded_into_its_convolution(model):
    folded = rewritten(model, fold_branches)
    assert_same(model, folded, normal(2, 8, 9, 9), 1e-4)
    assert operators(folded)["Conv"] == 1


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("branch", ["Gemm", "transposed", "MatMul"])
@pytest.mark.parametrize("kind", ["Gemm", "transposed", "MatMul"])
def test_a_branch_is_folded_into_its_matrix(kind, branch, parts):
    net = Net(10)

    def product(kind, x, rows, columns, *bias):
        if kind == "transposed":
            return net("Gemm", x, normal(columns, rows), *bias, transB=1)
        return net(kind, x, normal(rows, columns), *bias)

    y = product(kind, "x", 10, 6, *([] if kind == "MatMul" else [normal(6)]))
    if parts == 2:
        share = product(branch, product(branch, "x", 10, 2), 2, 6)
    else:
        share = product(branch, "x", 10, 6)
    net("Add", y, share)
    folded = rewritten(net.model(), fold_branches)
    assert_same(net.model(), folded, normal(4, 10), 1e-4)
    graph = Graph(folded)
    assert sum(node.outputs[0].const_value is None for node in graph.nodes) == 1


def test_a_branch_that_pads_for_itself_is_folded():
    net, pads = Net(4, 6, 6), np.array([0, 0, 1, 1, 0, 0, 1, 1])
    padded = [net("Pad", "x", pads, mode="reflect") for _ in range(2)]
    y = net("Conv", padded[0], normal(5, 4, 3, 3))
    net(
        "Add",
        y,
        net("Conv", net("Conv", padded[1], normal(2, 4, 3, 3)), normal(5, 2, 1, 1)),
    )
    folded = rewritten(net.model(), fold_branches)
    assert_same(net.model(), folded, normal(2, 4, 6, 6), 1e-4)
    assert operators(folded)["Conv"] == operators(folded)["Pad"] == 1


@pytest.mark.parametrize("reason", ["bias", "source", "stride", "shape", "reader"])
def test_what_is_no_branch_stays(reason):
    net = Net(4, 6, 6)
    weight = normal(5, 4, 1, 1)
    y = net("Conv", "x", weight)
    source = net("Relu", "x") if reason == "source" else "x"
    how = {"dilations": [2, 2], "pads": [1, 1, 1, 1]} if reason == "stride" else {}
    size = 1 if reason != "stride" else 2
    inner = normal(2, 4, 3, 3) if reason == "shape" else normal(2, 4, size, size)
    if reason == "shape":
        how = {"pads": [1, 1, 1, 1]}
    bias = [normal(2)] if reason == "bias" else []
    a = net("Conv", source, inner, *bias, **how)
    total = net("Add", y, net("Conv", a, normal(5, 2, 1, 1)))
    if reason == "reader":
        total = net("Concat", total, a, axis=1)
    net("Relu", total)
    model = net.model()
    kept = rewritten(model, fold_branches)
    assert operators(kept) == operators(model)
    assert_same(model, kept, normal(2, 4, 6, 6))


@pytest.mark.parametrize("quantized", [True, False])
def test_convolutions_do_their_padding(quantized):
    net, pads = Net(3, 5, 5), np.array([0, 0, 0, 1, 0, 0, 2, 1])
    y = net("Pad", "x", pads, np.float32(0))
    y = net.rounded(y, zero=np.uint8(100)) if quantized else y
    net("Conv", y, normal(2, 3, 3, 3), pads=[1, 0, 1, 0])
    absorbed = rewritten(net.model(), absorb_padding)
    assert "Pad" not in operators(absorbed)
    assert_same(net.model(), absorbed, normal(2, 3, 5, 5))


def test_padding_with_other_values_stays():
    net = Net(3, 5, 5)
    y = net("Pad", "x", np.array([0, 0, 1, 1, 0, 0, 1, 1]), np.float32(1))
    net("Conv", y, normal(2, 3, 3, 3))
    assert operators(rewritten(net.model(), absorb_padding))["Pad"] == 1


def test_offsets_and_batch_norms_are_absorbed():
    net = Net(3, 5, 5)
    y = net("Conv", "x", normal(4, 3, 3, 3))
    y = net("Add", normal(4, 1, 1), y)
    variance = RANDOM.uniform(0.5, 2, 4).astype(np.float32)
    y = net("BatchNormalization", y, normal(4), normal(4), normal(4), variance)
    net("Add", y, normal(1, 1, 3, 3))  # an image, which no bias can hold
    absorbed = rewritten(net.model(), absorb_affine)
    kinds = operators(absorbed)
    assert kinds["Add"] == kinds["Conv"] == 1 and "BatchNormalization" not in kinds
    assert_same(net.model(), absorbed, normal(2, 3, 5, 5))


@pytest.mark.parametrize("dead", [False, True])
def test_steps_a_channel_become_one(dead):
    net = Net(3, 5, 5)
    y = net(
        "Clip",
        net("Conv", "x", normal(4, 3, 3, 3), normal(4)),
        np.float32(0),
        np.float32(6),
    )
    steps = np.array([6, 3, 1, 0.5], np.float32) / np.float32(255)
    zeros = np.zeros(4, np.uint8)
    if dead:  # a channel that was never seen above zero, in NNCF's way
        steps[3], zeros[3] = 1e-5, 128
    y = net.rounded(y, steps, zeros, axis=1)
    net("Conv", y, normal(8, 1, 3, 3), group=4)
    merged = rewritten(net.model(), merge_steps)
    assert "Clip" not in operators(merged)
    (rounding,) = [n for n in Graph(merged).nodes if n.op_type == "QuantizeLinear"]
    assert known(rounding.inputs[1]).size == 1
    assert_same(net.model(), merged, 3 * normal(2, 3, 5, 5), 2e-4)


def test_values_are_rounded_before_and_after_they_are_moved():
    net = Net(4, 6, 6)
    convs = [net("Conv", "x", normal(3, 4, 1, 1)) for _ in range(2)]
    y = net("MaxPool", net("Concat", *convs, axis=1), kernel_shape=[2, 2])
    y = net("MaxPool", net.rounded(y, zero=np.uint8(128)), kernel_shape=[2, 2])
    net("Conv", y, normal(2, 6, 1, 1))
    moved = rewritten(net.model(), round_before_moving, round_after_moving)
    x = normal(2, 4, 6, 6)
    np.testing.assert_array_equal(run(moved, x), run(net.model(), x))
    graph = Graph(moved)
    for node in graph.nodes:
        if node.op_type == "Conv" and node.inputs[0].name == "x":
            (reader,) = node.outputs[0].consumers()
            assert reader.op_type == "QuantizeLinear"
        elif node.op_type == "Conv":
            assert producer(node.inputs[0]).op_type == "DequantizeLinear"


def residual(reason=None, size=1.0):
    """A sum whose `skip` and result are rounded for the layers that read them."""
    net = Net(4, 6, 6)
    x = net.rounded("x", zero=np.uint8(128))
    skip = net("Conv", x, np.float32(0.1) * normal(5, 4, 1, 1))
    read = net.rounded(skip, np.float32(0.01), np.uint8(128))
    layer = net("Conv", read, np.float32(size) * normal(5, 5, 1, 1))
    if reason == "float skip":
        skip = net("Neg", skip)
    total = net("Relu", net("Add", skip, layer))
    last = net("Conv", net.rounded(total), np.eye(5, dtype=np.float32)[..., None, None])
    if reason == "float reader":
        net("Concat", last, total, axis=1)
    return net.model()


@pytest.mark.parametrize("size", [0.1, 1, 100])
def test_residual_sums_are_rounded_and_nothing_more(size):
    """By half a step of the skip and half the layer's, however much is clipped."""
    x = normal(2, 4, 6, 6)
    before = residual(size=size)
    after = rewritten(before, round_sums)
    apart = np.abs(run(after, x) - run(before, x)) / 0.02
    assert 0 < apart.max() < 1.1 and apart.mean() < 0.5
    clipped = (run(before, x) == np.float32(0.02) * 255).mean()
    assert (clipped > 0.1) == (size == 100)


def test_residual_sums_are_integer_kernels(tmp_path):
    written = rewritten(residual(), for_int8_kernels)
    run(written, normal(2, 4, 6, 6), tmp_path / "optimized.onnx")
    kinds = operators(onnx.load(tmp_path / "optimized.onnx"))
    assert kinds["QLinearConv"] == 2 and kinds["QLinearAdd"] == 1
    assert kinds["Conv"] == 1 and "Add" not in kinds  # the last has a float output


@pytest.mark.parametrize("reason", ["float skip", "float reader"])
def test_sums_of_unknown_range_stay(reason):
    model, x = residual(reason), normal(2, 4, 6, 6)
    kept = rewritten(model, round_sums)
    assert operators(kept) == operators(model)
    np.testing.assert_array_equal(run(kept, x), run(model, x))


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [
        (-8, 7, TensorProto.INT4),
        (-4, 3, TensorProto.INT4),
        (-1, 1, TensorProto.INT4),
        (-16, 15, TensorProto.INT8),
    ],
)
def test_few_bits_are_packed(low, high, kind):
    net = Net(4, 6, 6)
    values = RANDOM.integers(low - 2, high + 3, (5, 4, 1, 1)).astype(np.int8)
    net("Conv", "x", net.weight(values, low, high))
    packed = rewritten(net.model(), pack_weights)
    assert "Clip" not in operators(packed)
    (tensor,) = [t for t in packed.graph.initializer if tuple(t.dims) == values.shape]
    assert tensor.data_type == kind
    assert len(tensor.raw_data) == (10 if kind == TensorProto.INT4 else 20)
    x = normal(2, 4, 6, 6)
    np.testing.assert_array_equal(run(packed, x), run(net.model(), x))


def test_asymmetric_few_bits_are_packed_unsigned():
    net = Net(4)
    values = RANDOM.integers(0, 16, (6, 4)).astype(np.uint8)
    clipped = net("Clip", values, np.uint8(0), np.uint8(15))
    zero = RANDOM.integers(0, 16, 6).astype(np.uint8)
    scale = RANDOM.uniform(1, 2, 6).astype(np.float32)
    weight = net("DequantizeLinear", clipped, scale, zero, axis=0)
    net("Gemm", "x", weight, transB=1)
    packed = rewritten(net.model(), pack_weights)
    kinds = Counter(t.data_type for t in packed.graph.initializer)
    assert kinds[TensorProto.UINT4] == 2
    x = normal(3, 4)
    np.testing.assert_array_equal(run(packed, x), run(net.model(), x))


@pytest.mark.parametrize("transposed", [False, True])
def test_runtimes_multiply_factors_when_they_load_them(transposed, tmp_path):
    net = Net(8, 9, 9)
    a, b = (
        RANDOM.integers(-127, 128, shape).astype(np.int8) for shape in ((4, 9), (8, 4))
    )
    if transposed:
        parts = [net("Transpose", net.weight(part), perm=[1, 0]) for part in (a, b)]
        kernel = net("Transpose", net("MatMul", *parts), perm=[1, 0])
    else:
        kernel = net("MatMul", net.weight(b), net.weight(a))
    kernel = net("Reshape", kernel, np.array([8, 1, 3, 3]))
    y = net("GlobalAveragePool", net("Conv", "x", kernel, group=8))
    last = net("Transpose", net.weight(normal(5, 8).astype(np.int8)), perm=[1, 0])
    net("MatMul", net("Flatten", y), last)
    written = rewritten(net.model(), pack_weights, constants_by_arithmetic)
    x = normal(2, 8, 9, 9)
    assert_same(net.model(), written, x)
    assert operators(written)["DequantizeLinear"] == 1  # of the last weight
    run(written, x, tmp_path / "optimized.onnx")
    assert not {"Cast", "Div"} & set(operators(onnx.load(tmp_path / "optimized.onnx")))


def test_a_network_deeper_than_the_stack_is_rewritten():
    net, x = Net(2, 3), "x"
    for _ in range(2000):
        x = net("Neg", x)
    values = RANDOM.integers(-8, 8, (5, 3)).astype(np.int8)
    net("Gemm", x, net.weight(values), transB=1)
    assert "Clip" not in operators(rewritten(net.model(), for_int8_kernels))


def quantized(bias):
    """Two convolutions, the first with a branch, the second with 4-bit weights."""
    net = Net(8, 9, 9)
    x = net.rounded("x", zero=np.uint8(128))
    main, a, b = (
        RANDOM.integers(-8, 8, shape).astype(np.int8)
        for shape in ((12, 8, 3, 3), (3, 8, 3, 3), (12, 3, 1, 1))
    )
    y = net("Conv", x, net.weight(main), bias)
    y = net("Add", y, net("Conv", net("Conv", x, net.weight(a)), net.weight(b)))
    y = net.rounded(net("Relu", y))
    values = RANDOM.integers(-8, 8, (5, 12, 1, 1)).astype(np.int8)
    net.rounded(
        net("Conv", y, net.weight(values), normal(5)), np.float32(0.1), np.uint8(99)
    )
    return net.model()


def test_int8_kernels_compute_the_same(tmp_path):
    model = quantized(normal(12))
    written = rewritten(model, for_int8_kernels)
    stored = Counter(t.data_type for t in written.graph.initializer if len(t.dims) == 4)
    assert stored[TensorProto.INT4] == 4
    x = normal(16, 8, 9, 9)
    found = run(written, x, tmp_path / "optimized.onnx")
    kinds = operators(onnx.load(tmp_path / "optimized.onnx"))
    assert kinds["QLinearConv"] == 2
    assert not {"Conv", "Add", "MatMul"} & set(kinds)
    expected = run(model, x)
    if SATURATES:
        found = run(written, x)
    # Weights of 8 bits and int32 biases: now and then the next level.
    levels = np.round((found - expected) / 0.1)
    assert np.abs(levels).max() <= 1 and (levels == 0).mean() > 0.95
    assert np.unique(expected).size > 10


def test_a_bias_too_large_for_int32_keeps_its_value():
    model = quantized(np.array([1e3, *[0.1] * 11], np.float32))
    scales = [t for t in model.graph.initializer if tuple(t.dims) == (12,)]
    tiny = numpy_helper.to_array(scales[0]).copy()
    tiny[0] = 1e-12
    scales[0].CopyFrom(numpy_helper.from_array(tiny, scales[0].name))
    written = rewritten(model, for_int8_kernels)
    biases = [t for t in written.graph.initializer if t.data_type == TensorProto.INT32]
    assert all(np.abs(numpy_helper.to_array(t)).max() <= 2**30 for t in biases)
    x = normal(4, 8, 9, 9)
    assert (np.abs(run(written, x) - run(model, x)) < 0.15).mean() > 0.99


def test_a_model_of_float_activations_keeps_float_weights():
    net = Net(4, 6, 6)
    net("Conv", "x", net.weight(RANDOM.integers(-8, 8, (5, 4, 1, 1)).astype(np.int8)))
    written = rewritten(net.model(), for_int8_kernels)
    assert "QuantizeLinear" not in operators(written)
    assert_same(net.model(), written, normal(2, 4, 6, 6))
