"""Forms of terms: what they cost, hold, run and amount to."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cora_plugin.adapters import (
    Adapter,
    Branch,
    Form,
    Kind,
    Operation,
    Term,
    load_adapters,
    save_adapters,
)
from cora_plugin.adapters.errors import CoRaError

BITS = (2, 3, 4, 5, 6, 7, 8, 32)

properties = settings(deadline=None, max_examples=80)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def operations(draw):
    """An operation, the shape of its weight and an input."""
    axes = draw(st.integers(0, 3))
    if not axes:
        rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 8))
        return Operation(), (rows, columns), randn(3, columns, seed=1)
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(axes))
    groups = draw(st.integers(1, 4))
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ones = (1,) * axes
    operation = Operation(axes, stride, ((1, 0),) * axes, "zeros", ones, groups)
    if draw(st.booleans()):
        sides, none = ((1, 1),) * axes, (0,) * axes
        operation = Operation(axes, stride, sides, "zeros", ones, groups, True, none)
    size = [5] * axes
    return (
        operation,
        (groups * outer, inner, *kernel),
        randn(2, groups * inner, *size, seed=1),
    )


@st.composite
def forms(draw, weight_shape, groups):
    """Any form beside such a layer, be it larger than the layer itself."""
    kinds = [Kind.LOW_RANK, Kind.WHOLE]
    if groups > 1 and weight_shape[1] == 1:
        kinds.append(Kind.SHARED_BASIS)
    rank, bits = draw(st.integers(1, 5)), draw(st.sampled_from(BITS))
    return Form(draw(st.sampled_from(kinds)), rank, bits, weight_shape, groups)


@st.composite
def adapters(draw, most=3):
    """An operation, an adapter beside it and an input."""
    operation, weight_shape, x = draw(operations())
    chosen = draw(st.lists(forms(weight_shape, operation.groups), max_size=most))
    terms = [
        filled(form, seed)
        for seed, form in enumerate(
            chosen or [draw(forms(weight_shape, operation.groups))]
        )
    ]
    return operation, Adapter(tuple(terms)), x


def filled(form: Form, seed: int = 0) -> Term:
    shapes = form.shapes.items()
    values = {n: randn(*shape, seed=10 * seed + len(n)) for n, shape in shapes}
    return Term(form, form.quantize(values))


@properties
@given(adapters(), st.integers(1, 100))
def test_the_cost_is_what_is_stored(made, outputs):
    _, adapter, _ = made
    cost = adapter.cost(outputs)
    assert cost.parameters == adapter.parameters
    assert cost.bits == adapter.stored_bits
    assert cost.of("params") == sum(form.cost().parameters for form in adapter.forms)
    tensors = adapter.tensors.values()
    scales = sum(t.scale.numel() for t in tensors if t.scale is not None)
    assert cost.bits - 32 * scales == sum(t.bits * t.values.numel() for t in tensors)


@properties
@given(adapters())
def test_the_macs_are_those_that_run(made):
    operation, adapter, x = made
    x = x[:1]
    with FlopCounterMode(display=False) as counter:
        y = Branch(adapter, operation)(x)
    outputs = y.numel() // adapter.weight_shape[0]
    slides = x[:, 0].numel() if operation.transposed else outputs
    built = sum(  # kernels BA, once and not an image
        form.rank * math.prod(form.weight_shape)
        for form in adapter.forms
        if form.kind is Kind.SHARED_BASIS
    )
    assert adapter.cost(outputs, slides).macs == counter.get_total_flops() // 2 - built


@properties
@given(adapters())
def test_what_runs_is_what_it_amounts_to(made):
    operation, adapter, x = made
    expected = operation(x.double(), adapter.merged().double())
    found = Branch(adapter, operation).double()(x.double())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@properties
@given(adapters())
def test_terms_add_up(made):
    operation, adapter, x = made
    alone = [Adapter((term,)) for term in adapter.terms]
    summed = sum(each.merged() for each in alone)
    torch.testing.assert_close(adapter.merged(), summed)
    shares = sum(Branch(each, operation)(x) for each in alone)
    torch.testing.assert_close(
        Branch(adapter, operation)(x), shares, atol=1e-5, rtol=1e-5
    )
    assert str(adapter) == " + ".join(map(str, alone))
    assert adapter.stored_bits == sum(each.stored_bits for each in alone)
    half = adapter.scaled(0.5)
    torch.testing.assert_close(half.merged(), adapter.merged() / 2)
    assert half.stored_bits == adapter.stored_bits


@properties
@given(made=adapters())
def test_a_file_gives_back_every_term(made, tmp_path_factory):
    _, adapter, _ = made
    path = tmp_path_factory.mktemp("form") / "adapters.safetensors"
    save_adapters(path, {"conv": adapter})
    read = load_adapters(path)[0]["conv"]
    assert read.forms == adapter.forms
    assert read.tensors.keys() == adapter.tensors.keys()
    for name, tensor in adapter.tensors.items():
        found = read.tensors[name]
        assert torch.equal(found.values, tensor.values)
        assert (found.scale is None) == (tensor.scale is None)
        assert tensor.scale is None or torch.equal(found.scale, tensor.scale)


@properties
@given(adapters())
def test_quantizing_an_adapter_again_gives_the_same_integers(made):
    _, adapter, _ = made
    values = {name: t.dequantize() for name, t in adapter.tensors.items()}
    again = Adapter.of(adapter.forms, values)
    for name, tensor in adapter.tensors.items():
        assert torch.equal(again.tensors[name].values, tensor.values)


@properties
@given(operations(), st.integers(1, 8), st.sampled_from(BITS))
def test_the_smallest_form_of_a_rank_is_never_larger_than_the_whole(made, rank, bits):
    operation, weight_shape, _ = made
    form = Form.smallest(rank, bits, weight_shape, operation.groups)
    whole = Form.whole(bits, weight_shape, operation.groups)
    values, most = (sum(map(math.prod, e.shapes.values())) for e in (form, whole))
    assert values <= most == math.prod(weight_shape)
    assert form.factored == (values < most)
    assert form.rank == rank


@pytest.mark.parametrize("bits", BITS)
def test_scales_stand_by_channel_in_a_and_once_in_b(bits):
    made = filled(Form(Kind.LOW_RANK, 3, bits, (8, 4, 3, 3), 2)).tensors
    if bits == 32:
        assert made["a"].scale is made["b"].scale is None
    else:
        assert made["a"].scale.shape == (6, 1, 1, 1)
        assert made["b"].scale.shape == (1, 1, 1, 1)


def test_names_of_further_terms_count_from_one():
    low_rank = Form(Kind.LOW_RANK, 1, 8, (4, 6))
    whole = Form.whole(2, (4, 6))
    adapter = Adapter((filled(low_rank), filled(whole), filled(low_rank)))
    assert list(adapter.tensors) == ["a", "b", "a1", "a2", "b2"]
    assert str(adapter) == "low-rank 1 + whole 2 bits + low-rank 1"
    assert adapter.kinds == "low-rank + whole + low-rank"
    assert (adapter.kind, adapter.rank) == (Kind.LOW_RANK, 1)
    assert dict(Branch(adapter, Operation()).named_buffers()).keys() == {
        *adapter.tensors
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((Kind.WHOLE, 1, 9, (4, 6), 1), "9 bits are not stored"),
        ((Kind.WHOLE, 1, 1, (4, 6), 1), "1 bits are not stored"),
        ((Kind.LOW_RANK, 0, 8, (4, 6), 1), "whole numbers above 0"),
        ((Kind.LOW_RANK, 1.0, 8, (4, 6), 1), "whole numbers above 0"),
        ((Kind.LOW_RANK, 1, 8, (4,), 1), "1 groups do not divide a weight"),
        ((Kind.LOW_RANK, 1, 8, (4, 6, 1), 3), "3 groups do not divide a weight"),
        ((Kind.SHARED_BASIS, 1, 8, (4, 1, 3), 1), "is not depthwise"),
        ((Kind.SHARED_BASIS, 1, 8, (4, 2, 3), 4), "is not depthwise"),
    ],
)
def test_an_impossible_form_is_refused(fields, message):
    with pytest.raises(CoRaError, match=message):
        Form(*fields)


def test_tensors_of_another_form_are_refused():
    term = filled(Form(Kind.LOW_RANK, 1, 8, (4, 6)))
    with pytest.raises(CoRaError, match=r"a low-rank 2 term .* holds .*, not "):
        Term(Form(Kind.LOW_RANK, 2, 8, (4, 6)), term.tensors)


def test_terms_of_different_layers_are_refused():
    terms = filled(Form.whole(2, (4, 6))), filled(Form.whole(2, (4, 5)))
    with pytest.raises(CoRaError, match="for one weight"):
        Adapter(terms)
    with pytest.raises(CoRaError, match="needs terms"):
        Adapter(())
