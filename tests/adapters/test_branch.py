import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cora_plugin.adapters import (
    Adapter,
    Branch,
    Form,
    Kind,
    Operation,
    QuantizedTensor,
    Term,
    make_adapter,
    truncate,
)
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import Weighting
from cora_plugin.adapters.form import full_rank, is_depthwise, residual_matrices
from cora_plugin.adapters.operation import output_rows, patches

properties = settings(deadline=None, max_examples=60)

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = ("zeros", "reflect", "replicate", "circular")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@st.composite
def convolutions(draw, symmetric=False):
    """An operation, its weight and an input: [m, n/g, *kernel], [N, n, *size]."""
    axes = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, dilation = each(1, 3), each(1, 2)
    same = draw(st.booleans())
    # torch has no strided "same".
    stride = (1,) * axes if same and symmetric else each(1, 3)
    before = each(0, 2)
    after = before if symmetric else each(0, 2)
    padding = "same" if same else tuple(zip(before, after, strict=True))
    groups = draw(st.integers(1, 3))
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    # Reflection must fit into the input.
    size = tuple(
        max((k - 1) * d + 1, 6) + extra
        for k, d, extra in zip(kernel, dilation, each(0, 3), strict=True)
    )
    mode = draw(st.sampled_from(MODES))
    operation = Operation(axes, stride, padding, mode, dilation, groups)
    seed = draw(st.integers(0, 1000))
    weight = randn(groups * outer, inner, *kernel, seed=seed)
    return operation, weight, randn(2, groups * inner, *size, seed=seed + 1)


@st.composite
def transposed(draw):
    """The same of transposed convolutions."""
    axes = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    more = tuple(
        draw(st.integers(0, max(pair) - 1))
        for pair in zip(stride, dilation, strict=True)
    )
    # More than a kernel reaches may be dropped.
    padding = tuple((side, side) for side in each(0, 2))
    groups, inner, outer = (draw(st.integers(1, 3)) for _ in range(3))
    operation = Operation(axes, stride, padding, "zeros", dilation, groups, True, more)
    seed = draw(st.integers(0, 1000))
    weight = randn(groups * outer, inner, *kernel, seed=seed)
    size = tuple(draw(st.integers(5, 7)) for _ in range(axes))
    return operation, weight, randn(2, groups * inner, *size, seed=seed + 1)


@st.composite
def linears(draw):
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    extra = draw(st.lists(st.integers(1, 4), max_size=2))
    return Operation(), randn(rows, columns), randn(3, *extra, columns, seed=1)


layers = st.one_of(convolutions(), transposed(), linears())


def run(adapter: Adapter, operation: Operation, x: Tensor) -> Tensor:
    return Branch(adapter, operation).double()(x)


def factored(weight: Tensor, operation: Operation, a: Tensor, b: Tensor) -> Adapter:
    """An adapter of given factors [g, r, k] and [g, m/g, r], stored in float."""
    shape, groups = tuple(weight.shape), operation.groups
    kind = Kind.SHARED_BASIS if is_depthwise(shape, groups) else Kind.LOW_RANK
    form = Form(kind, a.shape[1], 32, shape, groups)
    values = form.values(weight, a, b).items()
    # Not by `Form.quantize`, which would round to float32.
    stored = {name: QuantizedTensor(value, None, 32) for name, value in values}
    return Adapter((Term(form, stored),))


@properties
@given(layers, st.data())
def test_the_branch_is_the_operation_with_the_merged_kernel(layer, data):
    operation, weight, x = layer
    rank = data.draw(st.integers(1, full_rank(tuple(weight.shape), operation.groups)))
    bits = data.draw(st.sampled_from([2, 4, 8, 32]))
    adapter = make_adapter(weight, operation, rank, Weighting(), bits)
    expected = operation(x, adapter.merged().double())
    torch.testing.assert_close(
        run(adapter, operation, x), expected, rtol=1e-4, atol=1e-5
    )


@properties
@given(convolutions(symmetric=True))
def test_the_operation_is_the_convolution_of_torch(layer):
    operation, weight, x = layer
    same = operation.padding == "same"
    convolution = CONVOLUTION[operation.dimensions](
        x.shape[1],
        len(weight),
        tuple(weight.shape[2:]),
        stride=operation.stride,
        padding="same" if same else tuple(side for side, _ in operation.padding),
        dilation=operation.dilation,
        groups=operation.groups,
        padding_mode=operation.padding_mode,
        bias=False,
    ).double()
    convolution.weight.data.copy_(weight)
    torch.testing.assert_close(operation(x, weight), convolution(x))


@properties
@given(transposed())
def test_the_transposed_operation_is_that_of_torch(layer):
    operation, weight, x = layer
    convolution = TRANSPOSED[operation.dimensions](
        x.shape[1],
        len(weight),
        tuple(weight.shape[2:]),
        stride=operation.stride,
        padding=tuple(side for side, _ in operation.padding),
        output_padding=operation.output_padding,
        dilation=operation.dilation,
        groups=operation.groups,
        bias=False,
    ).double()
    held = operation.layout(weight)
    assert held.shape == convolution.weight.shape
    assert torch.equal(operation.layout(held), weight)
    convolution.weight.data.copy_(held)
    output = convolution(x)
    torch.testing.assert_close(operation(x, weight), output)
    kernel = tuple(weight.shape[2:])
    assert operation.output_size(x, kernel) == tuple(output.shape[2:])


@properties
@given(st.one_of(convolutions(), transposed()))
def test_patches_times_the_weight_are_the_output(layer):
    operation, weight, x = layer
    columns = patches(x, operation, tuple(weight.shape[2:]))  # [g, p, k]
    product = columns @ operation.matrices(weight).mT  # [g, p, m/g]
    rows = output_rows(operation(x, weight), operation)  # [N, g, p, m/g]
    torch.testing.assert_close(product, rows.transpose(0, 1).flatten(1, 2))


@properties
@given(convolutions())
def test_same_keeps_one_position_a_stride(layer):
    operation, weight, x = layer
    if operation.padding == "same":
        size = operation(x, weight).shape[2:]
        whole = zip(x.shape[2:], operation.stride, strict=True)
        assert tuple(size) == tuple(math.ceil(n / s) for n, s in whole)


def test_padding_is_before_and_after_each_axis_in_order():
    operation = Operation(2, (1, 1), ((1, 2), (3, 4)), "zeros", (1, 1), 1)
    padded = operation.pad(torch.ones(1, 1, 5, 5), (3, 3))
    expected = torch.zeros(1, 1, 8, 12)
    expected[..., 1:6, 3:8] = 1
    assert torch.equal(padded, expected)


@properties
@given(layers)
def test_full_rank_kept_whole_restores_the_float_layer(layer):
    operation, weight, x = layer
    quantized = (weight * 2).round() / 2
    rank = full_rank(tuple(weight.shape), operation.groups)
    adapter = make_adapter(weight - quantized, operation, rank, Weighting(), 32)
    restored = operation(x, quantized) + run(adapter, operation, x)
    torch.testing.assert_close(restored, operation(x, weight), rtol=1e-4, atol=1e-4)


@properties
@given(layers)
def test_factors_of_full_rank_restore_the_float_layer(layer):
    operation, weight, x = layer
    quantized = (weight * 2).round() / 2
    matrices = residual_matrices(weight - quantized, operation.groups)
    rank = full_rank(tuple(weight.shape), operation.groups)
    a, b = truncate(matrices, rank, Weighting())
    torch.testing.assert_close(b @ a, matrices)
    adapter = factored(weight, operation, a, b)
    restored = operation(x, quantized) + run(adapter, operation, x)
    torch.testing.assert_close(restored, operation(x, weight), rtol=1e-6, atol=1e-6)


@properties
@given(layers, st.data())
def test_a_higher_rank_leaves_no_larger_residual(layer, data):
    operation, weight, _ = layer
    most = full_rank(tuple(weight.shape), operation.groups)
    low = data.draw(st.integers(1, most))
    high = data.draw(st.integers(low, most))
    errors = [
        (weight - make_adapter(weight, operation, r, Weighting(), 32).merged()).norm()
        for r in (low, high)
    ]
    assert errors[1] <= errors[0] + 1e-5


def test_each_kind_is_taken_where_it_is_the_smallest():
    plain = Operation(2, (1, 1), "same", "zeros", (1, 1), 1)
    depthwise = Operation(2, (1, 1), "same", "zeros", (1, 1), 64)
    kinds = {
        Kind.LOW_RANK: make_adapter(randn(32, 16, 3, 3), plain, 4, Weighting()),
        Kind.SHARED_BASIS: make_adapter(randn(64, 1, 3, 3), depthwise, 3, Weighting()),
        Kind.WHOLE: make_adapter(randn(32, 16, 3, 3), plain, 32, Weighting()),
    }
    for kind, adapter in kinds.items():
        assert adapter.kind is kind
        assert (
            adapter.parameters < math.prod(adapter.weight_shape) or kind is Kind.WHOLE
        )
    assert kinds[Kind.WHOLE].parameters == 32 * 16 * 9 + 32  # and a scale a channel


def test_the_branch_moves_with_its_module():
    adapter = make_adapter(randn(8, 9), Operation(), 2, Weighting())
    branch = Branch(adapter, Operation())
    assert {name for name, _ in branch.named_buffers()} == {"a", "b"}
    assert branch.half().a.dtype is torch.half


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_makes_no_adapter(rank):
    with pytest.raises(CoRaError, match=r"stem\.conv: rank"):
        make_adapter(randn(8, 9), Operation(), rank, Weighting(), name="stem.conv")


def test_a_rank_above_the_full_rank_is_refused_by_the_layer_name():
    with pytest.raises(CoRaError, match=r"stem\.conv: rank 9 .*pass rank <= 8"):
        make_adapter(randn(8, 9), Operation(), 9, Weighting(), name="stem.conv")


@pytest.mark.parametrize("rank", [1, 8])
def test_a_residual_that_is_not_finite_is_refused_by_the_layer_name(rank):
    residual = randn(8, 9)
    residual[3, 4] = float("nan")
    with pytest.raises(CoRaError, match=r"stem\.conv: .*NaN"):
        make_adapter(residual, Operation(), rank, Weighting(), name="stem.conv")
