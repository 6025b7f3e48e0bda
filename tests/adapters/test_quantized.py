import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_plugin.adapters import Operation, make_adapter, quantize
from cora_plugin.adapters.factor import Weighting

BITS = (2, 3, 4, 5, 6, 7, 8)
tensors = st.builds(
    lambda shape, seed, size: (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    ),
    st.sampled_from([(1, 1), (5, 7), (4, 3, 2), (6, 2, 3, 3), (2, 1, 1, 1, 1)]),
    st.integers(0, 1000),
    st.sampled_from([1e-44, 1e-30, 1e-6, 1.0, 1e6, 1e30]),
)


@settings(deadline=None)
@given(tensors, st.sampled_from(BITS))
def test_quantizing_again_gives_the_same_integers(tensor, bits):
    once = quantize(tensor, bits)
    again = quantize(once.dequantize(), bits)
    assert torch.equal(once.values, again.values)
    torch.testing.assert_close(once.scale, again.scale)


@settings(deadline=None)
@given(tensors, st.sampled_from(BITS))
def test_integers_stay_in_the_narrow_range_and_reach_it(tensor, bits):
    stored = quantize(tensor, bits)
    top = 2 ** (bits - 1) - 1
    largest = stored.values.int().flatten(1).abs().amax(1)
    assert stored.values.dtype is torch.int8
    assert int(largest.max()) <= top
    smallest = top * torch.finfo(torch.float32).smallest_normal
    lost = tensor.flatten(1).abs().amax(1) < smallest
    assert bool((torch.where(lost, 0, top) == largest).all())


@settings(deadline=None)
@given(tensors, st.sampled_from(BITS))
def test_no_value_moves_by_more_than_half_a_step(tensor, bits):
    stored = quantize(tensor, bits)
    error = (tensor.double() - stored.dequantize().double()).abs()
    assert bool((error <= 0.5001 * stored.scale.double()).all())


@pytest.mark.parametrize("bits", BITS)
def test_a_channel_of_zeros_stays_zero_and_leaves_the_others_alone(bits):
    tensor = torch.tensor([[0.0, 0.0], [0.5, -1.0]])
    stored = quantize(tensor, bits)
    assert torch.equal(stored.dequantize()[0], torch.zeros(2))
    assert torch.equal(stored.values[1:], quantize(tensor[1:], bits).values)


def test_each_channel_has_a_scale_of_its_own():
    stored = quantize(torch.tensor([[1.0, -0.5], [1000.0, 500.0]]), 8)
    assert stored.scale.shape == (2, 1)
    expected = torch.tensor([[1.0, -0.5], [1000.0, 500.0]])
    torch.testing.assert_close(stored.dequantize(), expected, rtol=0.01, atol=0)


@settings(deadline=None)
@given(tensors)
def test_32_bits_keep_the_float_values(tensor):
    stored = quantize(tensor, 32)
    assert stored.scale is None
    assert torch.equal(stored.dequantize(), tensor)


def test_stored_bits_count_values_and_scales():
    tensor = torch.randn(6, 2, 3, 3)
    assert quantize(tensor, 4).parameters == tensor.numel()
    assert quantize(tensor, 4).stored_bits == 4 * tensor.numel() + 32 * 6
    assert quantize(tensor, 32).stored_bits == 32 * tensor.numel()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_second_factors_have_a_single_scale_and_whole_columns(groups, bits):
    operation = Operation(2, (1, 1), ((1, 1), (1, 1)), "zeros", (1, 1), groups)
    residual = torch.randn(24, 12 // groups, 3, 3, dtype=torch.float64)
    residual[:6] *= 1e-3
    adapter = make_adapter(residual, operation, 3, Weighting(), bits)
    a, b = adapter.tensors["a"], adapter.tensors["b"]
    assert b.scale.shape == (1, 1, 1, 1)
    assert a.scale.shape == (3 * groups, 1, 1, 1)
    # Every rank's column uses all levels, whatever its share of the error.
    columns = b.values.reshape(groups, -1, 3).abs().amax(1)
    assert (columns == 2 ** (bits - 1) - 1).all()
    again = quantize(b.dequantize(), bits, channels=False)
    assert torch.equal(again.values, b.values)
    scales, values = a.scale.numel() + 1, a.values.numel() + b.values.numel()
    assert adapter.parameters == values + scales
    assert adapter.stored_bits == bits * values + 32 * scales
    plain = make_adapter(residual, operation, 3, Weighting(), 32).merged()
    error = (adapter.merged() - plain).norm() / plain.norm()
    assert error < (0.02 if bits == 8 else 0.25)


@pytest.mark.parametrize("bits", [4, 32])
def test_a_share_is_in_the_scale(bits):
    whole = quantize(torch.randn(5, 7), bits)
    half = whole.scaled(0.5)
    assert torch.equal(half.dequantize(), whole.dequantize() / 2)
    assert half.stored_bits == whole.stored_bits
    assert bits == 32 or half.values is whole.values
