from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cora_plugin.adapters import Form, Operation, SeriesProduct, expand, quantize
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factors import series

SHAPES = [(1, 1), (5, 7), (4, 3, 2), (6, 2, 3, 3)]
tensors = st.builds(
    lambda shape, seed, size, mean: (
        (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean)
        * size
    ),
    st.sampled_from(SHAPES),
    st.integers(0, 1000),
    st.sampled_from([1e-44, 1e-6, 1.0, 1e6, 1e30]),
    st.sampled_from([0.0, 3.0]),
)


@given(tensors, st.integers(2, 8), st.integers(1, 5), st.booleans())
def test_no_element_is_off_by_more_than_half_the_last_scale(
    tensor, bits, terms, channels
):
    found = expand(tensor, bits, terms, channels)
    error = (found.sum() - tensor.double()).abs()
    # A sum in float64 is as exact as its largest part, be the tensor smaller yet.
    widest = float(found.terms[0].scale.max()) * 2**bits
    rounding = 1e-15 * max(widest, float(tensor.abs().max()))
    assert bool((error <= found.bound * (1 + 1e-9) + rounding).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_error_falls_by_two_to_the_bits_with_each_term(bits):
    tensor = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    found = expand(tensor, bits, 4)
    errors = [float((found.sum(n) - tensor).norm()) for n in range(1, 5)]
    scales = [float(term.scale.flatten()[0]) for term in found.terms]
    for index in range(3):
        assert scales[index] / scales[index + 1] == 2**bits
        # Of evenly spread errors: within a tenth, but for the first, which is normal.
        assert errors[index] / errors[index + 1] > 0.9 * 2**bits
    assert all(
        int(t.values.min()) >= -(2 ** (bits - 1))
        and int(t.values.max()) < 2 ** (bits - 1)
        for t in found.terms
    )


def test_what_is_outside_the_range_saturates_and_is_kept():
    tensor = torch.tensor([[0.1, -0.4, 7.0, 0.3], [0.2, 0.5, -0.3, 0.0]])
    found = expand(tensor, 4, 3, ends=(-0.5, 0.5))
    assert found.saturated.coalesce().values().tolist() == [6.5]
    torch.testing.assert_close(found.sum().float(), tensor, atol=1.3e-4, rtol=0)


def test_constant_tensors_are_within_the_bound():
    found = expand(torch.full((2, 3), 4.25), 4, 2)
    torch.testing.assert_close(found.sum(), torch.full((2, 3), 4.25).double())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(2, 2), 1, 1), "bits=1"),
        ((torch.ones(2, 2), 4, 0), "terms=0"),
        ((torch.ones(2, 2), 4.5, 1), "bits=4.5"),
        ((torch.ones(2, 2), 4, 1.5), "terms=1.5"),
        ((torch.ones(()), 4, 1), "has no dimension"),
        ((torch.tensor([[float("nan")]]), 4, 1), "is not finite"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(CoRaError, match=message):
        expand(*arguments)


def _conv():
    random = torch.Generator().manual_seed(0)
    operation = Operation(2, (2, 2), ((1, 1), (1, 1)), "zeros", (1, 1), groups=2)
    weight = torch.randn(6, 2, 3, 3, generator=random)
    return operation, weight, torch.rand(5, 4, 9, 9, generator=random) * 3


@pytest.mark.parametrize("ends", [None, (0.0, 3.0), (0.0, 1.0)])
def test_the_product_of_both_series_nears_the_layer(ends):
    operation, weight, x = _conv()
    exact = operation(x, weight)
    errors = [
        float(
            (SeriesProduct(operation, expand(weight, 3, n), 3, n, ends)(x) - exact)
            .abs()
            .max()
        )
        for n in (1, 2, 3, 4)
    ]
    for before, after in pairwise(errors):
        assert after < before / 4
    assert errors[-1] < 1e-3 * float(exact.abs().max())


def test_products_above_an_order_are_left_out_and_matter_little():
    operation, weight, x = _conv()
    exact = operation(x, weight)
    full = SeriesProduct(operation, expand(weight, 4, 3), 4, 3)
    some = SeriesProduct(operation, expand(weight, 4, 3), 4, 3, order=3)
    assert len(list(full.products(x))) == 9
    assert len(list(some.products(x))) == 6
    one = SeriesProduct(operation, expand(weight, 4, 3), 4, 3, order=1)
    missed = [float((each(x) - exact).abs().max()) for each in (full, some, one)]
    assert missed[0] <= missed[1] < missed[2] / 50


def test_products_add_up_in_any_order():
    operation, weight, x = _conv()
    summands = list(SeriesProduct(operation, expand(weight, 4, 2), 4, 2).products(x))
    expected = torch.stack(summands).sum(0)
    for order in permutations(summands):
        total = torch.zeros_like(expected)
        for each in order:
            total = total + each
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_evenly_spread_values_lose_less_with_the_scale_for_them(bits):
    values = torch.rand(4, 4000, generator=torch.Generator().manual_seed(0)) - 0.5
    plain, even = (quantize(values, bits, even=each) for each in (False, True))
    lost = [float((e.dequantize() - values).square().mean()) for e in (plain, even)]
    top = 2 ** (bits - 1) - 1
    assert lost[1] / lost[0] == pytest.approx((top / (top + 0.5)) ** 2, rel=0.05)
    again = quantize(even.dequantize(), bits, even=True)
    assert torch.equal(again.values, even.values)
    torch.testing.assert_close(again.scale, even.scale)


def test_terms_of_a_residual_leave_less_and_less():
    residual = torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    form = Form.whole(2, (6, 4, 3, 3))
    left = [
        float((residual - series(residual, (form,) * n).merged()).norm())
        for n in (1, 2, 3)
    ]
    # Three levels: each term leaves a third, of values that are spread evenly.
    assert left[0] / left[1] == pytest.approx(3, rel=0.1)
    assert left[1] / left[2] == pytest.approx(3, rel=0.1)
