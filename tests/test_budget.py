import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cora_plugin import Budget
from cora_plugin.adapters import Branch, Form, Kind, Operation, make_adapter
from cora_plugin.adapters.factor import Weighting
from cora_plugin.budget import allowance, form_of, ladder
from cora_plugin.layer import QuantizedLayer


def layer_of(operation, *shape, name="layer"):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return QuantizedLayer(name, weight, weight.round(), operation, 4.0, 32 * shape[0])


def convolution(axes, groups):
    ones = (1,) * axes
    return Operation(axes, ones, "same", "zeros", ones, groups)


@st.composite
def layers(draw):
    axes, groups = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    if not axes:
        return layer_of(Operation(), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    return layer_of(convolution(axes, groups), groups * outer, inner, *kernel)


@settings(deadline=None, max_examples=100)
@given(layers(), st.sampled_from([2, 8, 32]))
def test_the_cost_of_a_rank_is_what_the_adapter_of_that_rank_stores(layer, bits):
    for rank in range(1, layer.full_rank + 1):
        cost = form_of(layer, rank, bits).cost(10)
        made = make_adapter(layer.residual, layer.operation, rank, Weighting(), bits)
        assert cost.of("params") == made.parameters
        assert cost.of("bits") == made.stored_bits
        stored = [each for t in made.tensors.values() for each in (t.values, t.scale)]
        numbers = sum(each.numel() for each in stored if each is not None)
        assert cost.parameters == numbers


@pytest.mark.parametrize(
    ("layer", "rank", "kind"),
    [
        (layer_of(convolution(2, 1), 12, 8, 3, 3), 3, Kind.LOW_RANK),
        (layer_of(convolution(2, 2), 12, 8, 3, 3), 2, Kind.LOW_RANK),
        (layer_of(convolution(1, 1), 12, 8, 3), 3, Kind.LOW_RANK),
        (layer_of(Operation(), 12, 8), 3, Kind.LOW_RANK),
        (layer_of(convolution(2, 1), 12, 8, 3, 3), 12, Kind.WHOLE),
        (layer_of(convolution(2, 24), 24, 1, 3, 3), 9, Kind.WHOLE),
        (layer_of(convolution(2, 24), 24, 1, 3, 3), 4, Kind.SHARED_BASIS),
    ],
)
def test_the_macs_of_a_rank_are_those_that_the_branch_does(layer, rank, kind):
    size = [7] * layer.operation.dimensions
    outputs = math.prod(size)
    adapter = make_adapter(layer.residual, layer.operation, rank, Weighting())
    assert adapter.kind is kind
    channels = layer.weight.shape[1] * layer.operation.groups
    with FlopCounterMode(display=False) as counter:
        Branch(adapter, layer.operation)(torch.randn(1, channels, *size))
    done = counter.get_total_flops() // 2
    if kind is Kind.SHARED_BASIS:
        done -= rank * layer.weight.numel()  # the kernel BA, once and not an image
    assert form_of(layer, rank, 8).cost(outputs).of("macs") == done


@settings(deadline=None, max_examples=100)
@given(layers(), st.sampled_from([2, 8, 32]))
def test_the_ladder_never_offers_factors_as_large_as_the_residual(layer, bits):
    layer = replace(layer, weight_bits=8.0)
    forms = ladder(layer, bits)
    ranks, costs = zip(*((form.rank, form.cost(10)) for form in forms), strict=True)
    whole = Form.whole(bits, tuple(layer.weight.shape), layer.operation.groups)
    assert forms[-1] == whole
    values = [sum(map(math.prod, form.shapes.values())) for form in forms[:-1]]
    assert all(each < layer.weight.numel() for each in values)
    assert list(ranks) == sorted(set(ranks))
    for unit in ("params", "bits", "macs"):
        spent = [cost.of(unit) for cost in costs]
        assert spent == sorted(spent)


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 40), st.sampled_from([3, 4, 5, 8]), st.sampled_from([2, 4, 8]))
def test_depthwise_layers_never_store_more_than_8_bits_would(channels, main, bits):
    layer = layer_of(convolution(2, channels), channels, 1, 3, 3)
    layer = replace(layer, weight_bits=float(main))
    plain = replace(layer, weight_bits=8.0).stored_bits
    kept = {form.rank for form in ladder(layer, bits)}
    for rank in range(1, layer.full_rank + 1):
        form = form_of(layer, rank, bits)
        if layer.stored_bits + form.cost().bits > plain and main < 8:
            assert rank not in kept
        elif (
            form.cost().bits < Form.whole(bits, form.weight_shape, channels).cost().bits
        ):
            assert rank in kept


def test_the_allowance_is_a_share_of_the_whole_model():
    layers = [layer_of(Operation(), 10, 20, name="a"), layer_of(Operation(), 5, 8)]
    positions = {"a": (1, 1), "layer": (200, 50)}
    assert allowance(Budget(0.1), layers, positions) == pytest.approx(24)
    assert allowance(Budget(0.5, "bits"), layers, positions) == pytest.approx(120)
    macs = allowance(Budget(0.1, "macs"), layers, positions)
    assert macs == pytest.approx(0.1 * (200 + 40 * 50))
