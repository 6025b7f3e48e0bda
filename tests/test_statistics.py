import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cora_plugin import CoRaConfig, CoRaError
from cora_plugin.adapters import Operation
from cora_plugin.adapters.factor import weighted_error
from cora_plugin.layer import QuantizedLayer
from cora_plugin.statistics import (
    InputMoments,
    LayerStatistics,
    OutputSensitivity,
    weighting,
)
from cora_plugin.statistics import moments as module

WHOLE = 10**6
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(operation, *shape):
    weight = randn(*shape)
    return QuantizedLayer("stem.conv", weight, weight.round(), operation, 4.0, 0)


def conv(kernel, stride=1, padding=0, mode="zeros", dilation=1, groups=1):
    sides = padding if padding == "same" else ((padding, padding),) * len(kernel)
    axes = len(kernel)
    return Operation(axes, (stride,) * axes, sides, mode, (dilation,) * axes, groups)


def unfolded(x, operation, kernel):
    """All columns by torch's own unfold, [g, p, k] (2d, not "same")."""
    flat = [side for axis in reversed(operation.padding) for side in axis]
    mode = MODES[operation.padding_mode]
    padded = F.pad(x.double(), flat, mode=mode)
    columns = F.unfold(
        padded, kernel, dilation=operation.dilation, stride=operation.stride
    )
    split = columns.unflatten(1, (operation.groups, -1))  # [N, g, k, p]
    return split.permute(1, 0, 3, 2).flatten(1, 2)


def moment(layer, inputs, kind="second", max_size=WHOLE, positions=0):
    running = InputMoments(layer, kind, max_size, positions)
    for x in inputs:
        running.update(x, layer.operation(x, layer.weight))
    return running.mean()


@st.composite
def convolutions(draw):
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    operation = conv(
        kernel,
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2)),
        draw(st.sampled_from(sorted(MODES))),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layer = layer_of(operation, operation.groups * outer, inner, *kernel)
    size = [draw(st.integers(5, 9)) for _ in kernel]
    return layer, randn(
        3, operation.groups * inner, *size, seed=draw(st.integers(0, 9))
    )


@settings(deadline=None)
@given(convolutions())
def test_moments_are_those_of_the_unfolded_input(drawn):
    layer, x = drawn
    u = unfolded(x, layer.operation, layer.kernel)
    batches = (x[:1], x[1:])
    second = u.mT @ u / u.shape[1]
    torch.testing.assert_close(moment(layer, batches), second[:, None])
    square = moment(layer, batches, "square")
    torch.testing.assert_close(square, u.square().mean(1))
    absolute = moment(layer, batches, "absolute")
    torch.testing.assert_close(absolute, u.abs().mean(1))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_moments_measure_what_a_residual_does_to_the_output(axes, mode, padding):
    # Mean |E ∗ x|² over positions is tr(E R Eᵀ), whatever the padding.
    operation = conv((3,) * axes, 2, padding, mode, 1, 2)
    layer = layer_of(operation, 8, 3, *(3,) * axes)
    x = randn(2, 6, *range(6, 6 + axes))
    output = operation(x.double(), layer.residual)
    expected = output.square().sum() / output[:, 0].numel()
    metric = weighting(layer, moment(layer, [x]), None, 0.0)
    assert weighted_error(layer.matrices, metric) == pytest.approx(float(expected))


@pytest.mark.parametrize("positions", [8, 16])
@pytest.mark.parametrize("stride", [2, 3])
def test_moments_of_transposed_layers_hold_positions_of_every_kind(stride, positions):
    # Outputs differ by where they are in the stride: of each kind in the input's share.
    operation = Operation(
        2, (stride,) * 2, ((1, 1),) * 2, "zeros", (1, 1), 2, True, (1, 1)
    )
    layer = layer_of(operation, 8, 3, 3, 3)
    x = torch.ones(1, 6, 12, 12)
    diagonal = moment(layer, [x], "square", positions=positions)
    whole = moment(layer, [x], "square")
    torch.testing.assert_close(diagonal, whole, atol=0.2, rtol=0)
    assert diagonal.min() > 0


def test_moments_of_transposed_layers_measure_what_a_residual_does():
    operation = Operation(2, (2, 3), ((1, 1), (0, 0)), "zeros", (2, 1), 2, True, (1, 0))
    layer = layer_of(operation, 8, 3, 3, 2)
    x = randn(2, 6, 6, 7)
    output = operation(x.double(), layer.residual)
    expected = output.square().sum() / output[:, 0].numel()
    metric = weighting(layer, moment(layer, [x]), None, 0.0)
    assert weighted_error(layer.matrices, metric) == pytest.approx(float(expected))


@pytest.mark.parametrize("axes", [1, 2])
def test_a_depthwise_error_is_that_of_its_outputs_for_inputs_of_one_spectrum(axes):
    operation = conv((3,) * axes, 1, 0, groups=6)
    layer = layer_of(operation, 6, 1, *(3,) * axes)
    # One signal at six volumes: the separable form is exact.
    volumes = torch.tensor([1, 2, 0.1, 5, 3, 1]).view(1, 6, *(1,) * axes)
    x = randn(4, 1, *(12,) * axes) * volumes
    output = operation(x.double(), layer.residual)
    expected = output.square().sum() / output[:, 0].numel()
    metric = weighting(layer, moment(layer, [x]), None, 0.0)
    assert weighted_error(layer.matrices, metric) == pytest.approx(float(expected))


def test_moments_of_a_linear_layer_are_over_all_its_rows():
    layer = layer_of(Operation(), 4, 5)
    for shape in ((7, 5), (3, 6, 5), (2, 3, 4, 5)):
        x = randn(*shape)
        rows = x.double().reshape(-1, 5)
        torch.testing.assert_close(moment(layer, [x])[0, 0], rows.T @ rows / len(rows))


@pytest.mark.parametrize("max_size", [27, 26, 9, 8, 1])
def test_blocks_are_the_diagonal_blocks_of_whole_channels(max_size):
    layer = layer_of(conv((3, 3)), 4, 6, 3, 3)
    x = randn(2, 6, 7, 7)
    whole = moment(layer, [x])[0, 0]
    blocks = moment(layer, [x], max_size=max_size)[0]
    count, size, _ = blocks.shape
    assert size % 9 == 0
    assert size <= max(max_size, 9)
    for index in range(count):
        part = slice(index * size, (index + 1) * size)
        torch.testing.assert_close(blocks[index], whole[part, part])


@pytest.mark.parametrize(
    ("size", "positions"),
    [
        ((8, 8), 16),
        ((9, 7), 10),
        ((3, 100), 20),
        ((1, 40), 4),
        ((5, 5), 1),
        ((2, 2), 1),
    ],
)
def test_a_full_turn_of_batches_visits_every_position_alike(size, positions):
    layer = layer_of(conv((1, 1)), 2, math.prod(size), 1, 1)
    # Each position lights a channel of its own, whose moment counts its visits.
    x = torch.eye(math.prod(size)).reshape(1, -1, *size)
    running = InputMoments(layer, "square", WHOLE, positions)
    step = math.ceil(math.sqrt(math.prod(size) / positions))
    turns = math.prod(min(step, side) for side in size)
    for _ in range(turns):
        running.update(x, layer.operation(x, layer.weight))
    assert running.rows == math.prod(size)
    visits = running.mean()[0] * running.rows
    assert torch.equal(visits, torch.ones(math.prod(size)).double())


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_full_turn_of_batches_gives_the_whole_moment(axes, stride):
    operation = conv((3,) * axes, stride, 1, "zeros", 1, 2)
    layer = layer_of(operation, 4, 2, *(3,) * axes)
    x = randn(2, 4, *(9,) * axes)
    spatial = operation(x, layer.weight)[0, 0].numel()
    positions = min(spatial // 3, layer.columns)
    turns = math.ceil((spatial / positions) ** (1 / axes)) ** axes
    torch.testing.assert_close(
        moment(layer, [x] * turns, positions=positions), moment(layer, [x])
    )


def test_a_full_turn_of_a_linear_layer_visits_every_row_alike():
    layer = layer_of(Operation(), 4, 5)
    x = randn(3, 11, 5)
    torch.testing.assert_close(moment(layer, [x] * 4, positions=3), moment(layer, [x]))


def test_as_many_positions_as_there_are_keep_all():
    layer = layer_of(conv((3, 3)), 4, 8, 3, 3)
    x = randn(2, 8, 10, 10)
    assert torch.equal(moment(layer, [x], positions=64), moment(layer, [x]))


def test_an_image_gives_no_more_positions_than_its_columns_are_long():
    layer = layer_of(conv((3, 3), groups=6), 6, 1, 3, 3)  # k = 9
    x = randn(2, 6, 14, 14)
    running = InputMoments(layer, "second", WHOLE, 64)
    running.update(x, layer.operation(x, layer.weight))
    assert running.rows == 2 * 9


@pytest.mark.parametrize("positions", [0, 5])
@pytest.mark.parametrize(
    ("operation", "weight", "x"),
    [
        (conv((3, 3), 2, 1, groups=2), (4, 3, 3, 3), (8, 6, 9, 9)),
        (conv((3,), groups=4), (4, 1, 3), (8, 4, 20)),
        (Operation(), (4, 5), (8, 7, 5)),
    ],
)
def test_the_size_of_the_chunks_does_not_matter(
    operation, weight, x, positions, monkeypatch
):
    layer = layer_of(operation, *weight)
    inputs = [randn(*x, seed=seed) for seed in range(3)]
    expected = moment(layer, inputs, positions=positions)
    for chunk in (1, 200, 1000):
        monkeypatch.setattr(module, "CHUNK", chunk)
        torch.testing.assert_close(moment(layer, inputs, positions=positions), expected)


def test_many_small_batches_sum_as_exactly_as_one():
    layer = layer_of(Operation(), 2, 8)
    x = randn(4000, 8) + 1000
    rows = x.double()
    torch.testing.assert_close(
        moment(layer, x.split(1))[0, 0], rows.T @ rows / 4000, rtol=1e-12, atol=0
    )


def test_a_layer_that_was_never_reached_is_named_with_the_way_out():
    running = InputMoments(layer_of(conv((3, 3)), 4, 2, 3, 3), "second", WHOLE, 0)
    with pytest.raises(CoRaError, match=r"^stem\.conv: .*never reached.*: 0\}"):
        running.mean()


@pytest.mark.parametrize(
    ("operation", "weight", "shape"),
    [
        (conv((3, 3), groups=2), (6, 2, 3, 3), (5, 6, 4, 3)),
        (conv((3,)), (6, 2, 3), (5, 6, 4)),
        (conv((1, 1, 1)), (6, 2, 1, 1, 1), (5, 6, 4, 3, 2)),
        (Operation(), (6, 3), (5, 6)),
        (Operation(), (6, 3), (5, 7, 6)),
    ],
)
def test_sensitivity_is_the_second_moment_of_the_gradient_an_image(
    operation, weight, shape
):
    layer = layer_of(operation, *weight)
    gradient = randn(*shape)
    groups = operation.groups
    last = gradient.double().movedim(1, -1) if operation.dimensions else gradient
    rows = last.double().reshape(-1, groups, 6 // groups)
    expected = torch.zeros(groups, 6 // groups, 6 // groups).double()
    for row, group in itertools.product(rows, range(groups)):
        expected[group] += torch.outer(row[group], row[group]) / 5
    running = OutputSensitivity(layer, 0)
    running.update(gradient[:2])
    running.update(gradient[2:])
    torch.testing.assert_close(running.mean(5), expected)


def test_the_sensitivity_of_a_depthwise_layer_is_a_number_a_channel():
    layer = layer_of(conv((3, 3), groups=6), 6, 1, 3, 3)
    gradient = randn(5, 6, 4, 4)
    running = OutputSensitivity(layer, 0)
    running.update(gradient)
    expected = gradient.double().square().sum((0, 2, 3)) / 5
    torch.testing.assert_close(running.mean(5), expected[None])


@pytest.mark.parametrize("groups", [1, 6])
def test_a_full_turn_of_subsampled_gradients_gives_the_whole_sensitivity(groups):
    layer = layer_of(conv((3, 3), groups=groups), 6, 6 // groups, 3, 3)
    gradient = randn(5, 6, 4, 3)
    few, whole = OutputSensitivity(layer, 4), OutputSensitivity(layer, 0)
    for _ in range(3):
        few.update(gradient)
    whole.update(gradient)
    torch.testing.assert_close(few.mean(15), whole.mean(5))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("svd", lambda u: torch.eye(5).double()),
        ("lqer", lambda u: u.abs().mean(0).square().diag()),
        ("qera-approx", lambda u: u.square().mean(0).diag()),
        ("qera-exact", lambda u: u.T @ u / len(u)),
    ],
)
def test_each_metric_is_its_formula(metric, expected):
    layer = layer_of(Operation(), 3, 5)
    x = randn(40, 5) * torch.arange(1, 6) + 1
    kinds = {"lqer": "absolute", "qera-approx": "square", "qera-exact": "second"}
    moments = {}
    if metric in kinds:
        moments[kinds[metric]] = moment(layer, [x], kinds[metric])
    config = CoRaConfig(metric=metric, damping=0.0)
    statistics = LayerStatistics(moments, torch.eye(3).double()[None], 1, 1)
    error = weighted_error(layer.matrices, statistics.metric(layer, config))
    residual, m = layer.residual, expected(x.double())
    assert error == pytest.approx(float(torch.trace(residual @ m @ residual.T)))


@pytest.mark.parametrize("depthwise", [False, True])
def test_errors_are_measured_in_inputs_and_outputs_together(depthwise):
    if depthwise:
        layer = layer_of(conv((3,), groups=3), 3, 1, 3)
        x, curvature = randn(4, 1, 9).expand(4, 3, 9), torch.rand(1, 3).double()
        g = curvature[0].diag()
    else:
        layer = layer_of(Operation(), 3, 5)
        rows = randn(30, 3).double()
        x, g = randn(40, 5), rows.T @ rows / 30
        curvature = g[None]
    moments = {"second": moment(layer, [x])}
    statistics = LayerStatistics(moments, curvature, 1, 1)
    metric = statistics.observed(layer, CoRaConfig(damping=0.0))
    m, e = moments["second"][0, 0], layer.residual.flatten(1)
    expected = torch.trace(g @ e @ m @ e.T)
    assert weighted_error(layer.matrices, metric) == pytest.approx(float(expected))
