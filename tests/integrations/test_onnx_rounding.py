"""Rounding shifts go to layers whose weights are rounded, and to no others."""

from functools import partial

import numpy as np
import pytest
from onnx_files import operators
from onnx_net import RANDOM, Net, normal, rewritten, run

from cora_plugin.integrations.onnx.int8 import for_int8_kernels

SHIFT = np.linspace(-1, 1, 12, dtype=np.float32)


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order():
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state


def model(what, shift=SHIFT, step=0.02, out=0.02):
    """A layer with a branch and a shift, and the name of the shift."""
    RANDOM.bit_generator.state = np.random.default_rng(0).bit_generator.state
    linear = what.startswith("matrix")
    net = Net(5, 8) if linear else Net(8, 6, 6)
    quantized = "float" not in what
    x = net.rounded("x", np.float32(step), np.uint8(128)) if quantized else "x"
    if linear:
        y = net("MatMul", x, normal(8, 12))
        share = net("MatMul", net("MatMul", x, normal(8, 2)), normal(2, 12))
    else:
        how = {"strides": [2, 2]} if what == "no branch" else {}
        y = net("Conv", x, normal(12, 8, 1, 1), normal(12), **how)
        # A branch of other windows is no part of the layer's weight.
        wide = normal(3, 8, 2, 2) if what == "no branch" else normal(3, 8, 1, 1)
        share = net("Conv", net("Conv", x, wide, **how), normal(12, 3, 1, 1))
    y = net("Add", y, share)
    name = None
    if shift is not None:
        name = f"c{len(net.constants)}"
        y = net("Add", y, shift if linear else shift.reshape(12, 1, 1))
    if what == "norm":
        scale = normal(12)
        assert scale.min() < 0 < scale.max()
        norm = [normal(12), normal(12), np.abs(normal(12)) + 0.5]
        y = net("BatchNormalization", y, scale, *norm)
    y = net("Relu", y)
    net.rounded(y, np.float32(out))
    return net.model(), {name: "conv"}


def int8(graph, names):
    return rewritten(graph, partial(for_int8_kernels, rounding=names))


@pytest.mark.parametrize("what", ["bias", "norm", "matrix"])
def test_they_are_added_where_weights_are_rounded(what):
    graph, names = model(what)
    x = normal(4, 5, 8) if what == "matrix" else normal(4, 8, 6, 6)
    found = run(int8(graph, names), x)
    # As any other constant that is added there.
    np.testing.assert_array_equal(found, run(int8(graph, {}), x))
    plain, _ = model(what, None)
    assert not np.array_equal(found, run(int8(plain, {}), x))
    if what != "matrix":
        assert operators(int8(graph, names)) == operators(int8(plain, {}))


@pytest.mark.parametrize("what", ["float", "matrix, float", "no branch"])
def test_they_are_dropped_where_nothing_is_rounded(what):
    graph, names = model(what)
    plain, _ = model(what, None)
    x = normal(4, 5, 8) if "matrix" in what else normal(4, 8, 6, 6)
    found = run(int8(graph, names), x)
    np.testing.assert_array_equal(found, run(int8(plain, {}), x))
    assert not np.array_equal(found, run(int8(graph, {}), x))


@pytest.mark.parametrize(
    ("shift", "step", "out", "coarse"),
    [(1.0, 1.0, 0.02, False), (0.01, 1.0, 0.02, True), (0.01, 1.0, 1.0, False)],
    ids=["of many steps", "of less than one", "that no one sees"],
)
def test_steps_that_are_too_coarse_for_them_are_told(shift, step, out, coarse, caplog):
    graph, names = model("bias", shift * SHIFT, step, out)
    int8(graph, names)
    told = [e.getMessage() for e in caplog.records if "coarse" in e.getMessage()]
    assert [e.split(":")[0] for e in told] == ["conv"] * coarse
