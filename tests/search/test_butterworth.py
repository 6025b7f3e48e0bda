import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from options import candidate, costs, ranks
from plain_host import PlainHost
from torch import nn

from cora_plugin import CoRa, CoRaError
from cora_plugin.adapters import Factors, Operation
from cora_plugin.adapters.factor import Weighting, metric_root
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import KL, measure
from cora_plugin.outputs import only
from cora_plugin.search.butterworth import round_up
from cora_plugin.search.relaxation import (
    Relaxation,
    kernel,
    log_response,
    penalty,
    softened,
)


def real(value):
    return torch.tensor(value, dtype=torch.float64)


# The kernel.


@pytest.mark.parametrize("order", [1, 2.5, 4, 40])
def test_half_the_power_is_left_at_the_cutoff(order):
    assert log_response(real(1.0), order).exp() == pytest.approx(0.5)


@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("cutoff", [1 / 12, 0.3, 1.0])
def test_the_kernel_is_the_papers(order, cutoff):
    expected = [
        1 / math.sqrt(1 + ((i / 12) / cutoff) ** (2 * order)) for i in range(1, 13)
    ]
    damped = [(t / max(expected)) ** 2 for t in expected]
    assert kernel(real(cutoff), 12, order).tolist() == pytest.approx(damped)


@given(st.floats(1e-9, 1), st.integers(1, 2000), st.floats(0.1, 200))
def test_the_kernel_falls_from_one_and_has_a_gradient_whatever_its_order(
    cutoff, full_rank, order
):
    rho = real(cutoff).requires_grad_()
    kept = kernel(rho, full_rank, order)
    assert kept[0] == 1
    assert (kept.diff() <= 0).all()
    assert (kept >= 0).all()
    kept.sum().backward()
    assert torch.isfinite(rho.grad)


# The loss.


def test_the_softened_distance_on_hand_made_numbers():
    # p = (3/4, 1/4), at temperature 1/2 (9/10, 1/10); q = (2/3, 1/3) and (4/5, 1/5).
    reference, output = {"": real([[math.log(3), 0.0]])}, {"": real([[math.log(2), 0]])}
    for temperature, p, q in ((1.0, 0.75, 2 / 3), (0.5, 0.9, 0.8)):
        pair = (softened(each, temperature) for each in (reference, output))
        expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        assert KL().distance(*pair).tolist() == pytest.approx([expected])


def test_the_penalty_on_hand_made_numbers():
    assert penalty(real(0.04), 0.05, 3.0) == pytest.approx(3.0)
    assert penalty(real(0.05), 0.05, 3.0) == pytest.approx(3.0)
    assert penalty(real(1.05), 0.05, 3.0) == pytest.approx(3 * math.e)


# The relaxed weight.


def layer(shape, groups=1, stride=(1, 1)):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random)
    rounded = weight.mul(2).round() / 2
    operation = Operation()
    if len(shape) == 4:
        sides = ((0, 0), (0, 0))
        operation = Operation(2, stride, sides, "zeros", (1, 1), groups)
    return QuantizedLayer("layer", weight, rounded, operation, 3, 0)


LAYERS = {
    "wide": layer((6, 4, 3, 3)),
    "tall": layer((40, 2, 1, 1)),
    "grouped": layer((8, 2, 3, 3), groups=4),
    "depthwise": layer((16, 1, 3, 3), groups=16),
    "linear": layer((5, 7)),
}


def factored(layer, metric=None):
    return Factors.of(layer.residual, layer.operation, metric or Weighting())


@pytest.mark.parametrize("name", LAYERS)
def test_the_relaxed_weight_is_the_damped_product(name):
    here = LAYERS[name]
    kept = kernel(real(0.4), here.full_rank, 4)
    u, s, vh = torch.linalg.svd(here.matrices, full_matrices=False)
    t = kept.sqrt()
    product = (u * s.sqrt()[:, None] * t) @ (t[:, None] * s.sqrt()[..., None] * vh)
    expected = here.dequantized + product.reshape(here.weight.shape).float()
    relaxed = Relaxation.of(here, factored(here)).weight(kept)
    torch.testing.assert_close(relaxed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_it_runs_from_the_quantized_to_the_float_weight(name, weighted):
    here = LAYERS[name]
    metric = Weighting()
    if weighted:
        groups, _, columns = here.matrices.shape
        draw = torch.randn(groups, 1, columns, columns, dtype=torch.float64)
        metric = Weighting(metric_root(draw @ draw.mT, 1e-4, name))
    relaxed = Relaxation.of(here, factored(here, metric))
    none, everything = torch.zeros(here.full_rank), torch.ones(here.full_rank)
    assert torch.equal(relaxed.weight(none), here.dequantized)
    torch.testing.assert_close(
        relaxed.weight(everything), here.weight, rtol=1e-4, atol=1e-4
    )


# Holding the budget.


@st.composite
def choices(draw):
    candidates, wanted = [], {}
    for index in range(draw(st.integers(1, 5))):
        full = draw(st.integers(1, 40))
        rungs = (0, *sorted(draw(st.sets(st.integers(1, full))) | {full}))
        price = draw(st.integers(0, 30))
        name = f"layer{index}"
        candidates.append(candidate(name, rungs, [price * r for r in rungs]))
        wanted[name] = full * draw(st.floats(1 / full, 1))
    return candidates, wanted


def cost(candidates, chosen):
    return sum(costs(c)[c.ranks.index(chosen[c.name])] for c in candidates)


def hold(candidates, wanted, budget):
    return ranks(round_up(candidates, wanted, budget))


@given(choices(), st.floats(0, 3000))
def test_the_budget_is_never_exceeded(made, budget):
    candidates, wanted = made
    assert cost(candidates, hold(candidates, wanted, budget)) <= budget


@given(choices())
def test_what_fits_is_rounded_up_to_a_rank_there_is(made):
    candidates, wanted = made
    chosen = hold(candidates, wanted, math.inf)
    for c in candidates:
        most = max(1, math.ceil(wanted[c.name] - 1e-6))
        assert chosen[c.name] == min(r for r in c.ranks if r >= most)


@given(choices(), st.floats(0, 3000))
def test_the_order_of_the_layers_does_not_matter(made, budget):
    candidates, wanted = made
    assert hold(candidates, wanted, budget) == hold(candidates[::-1], wanted, budget)


def test_cutoffs_that_overshoot_shrink_in_proportion():
    rungs = tuple(range(11))
    layers = [candidate(name, rungs, rungs) for name in "ab"]
    assert hold(layers, {"a": 8.0, "b": 4.0}, 6) == {"a": 4, "b": 2}
    assert hold(layers, {"a": 8.0, "b": 4.0}, 12) == {"a": 8, "b": 4}


# The search on a net.


class Net(nn.Module):
    """A small net, some of whose layers matter far more than others."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        for convolution in (self.stem, self.down, self.depthwise, self.wide):
            x = convolution(x).relu()
        x = (self.mix(x) + x).relu()
        return self.head(x.mean((2, 3)))


def images(count, seed):
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=random)
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")


@pytest.fixture(scope="module")
def trained():
    """The net, taught to tell images by a product of their colours."""
    torch.manual_seed(0)
    net = Net()
    x = images(512, seed=1)
    colours = torch.cat([x[:, :, :8].mean((2, 3)), x[:, :, 8:].mean((2, 3))], 1)
    y = (colours.sign() @ torch.randn(6, 10)).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(200):
        part = slice(step * 32 % 512, step * 32 % 512 + 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[part]), y[part]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batches():
    return images(256, seed=2).split(32)


def kl(host, seed=3):
    x = images(512, seed)
    with torch.no_grad():
        return measure(KL(), {"": host.float_net(x)}, host.run(x)).kl


def learning(**settings):
    return {"search": "butterworth", "butterworth": {"iterations": 80, **settings}}


@pytest.mark.parametrize("metric", ["svd", "qera-exact"])
@pytest.mark.parametrize(("initial_cutoff", "iterations"), [(0.1, 80), (0.9, 160)])
def test_it_is_better_than_uniform_at_the_same_budget(
    trained, batches, metric, initial_cutoff, iterations
):
    learned = learning(initial_cutoff=initial_cutoff, iterations=iterations)
    distances = []
    for search in ({"search": "uniform"}, learned):
        host = PlainHost(trained)
        config = {"budget": 0.2, "metric": metric, **search}
        report = CoRa(config).apply(host, batches)
        assert 0 < report.budget_used <= report.budget_allowed
        distances.append(kl(host))
    assert distances[1] < 0.9 * distances[0]


def test_the_report_tells_the_effort(trained, batches):
    config = learning(iterations=7, images=40, batch_size=10)
    report = CoRa(config).apply(PlainHost(trained), batches)
    assert (report.search_iterations, report.search_images) == (7, 40)
    assert "ranks learned in 7 iterations on 40 images" in str(report)
    report = CoRa("search=uniform").apply(PlainHost(trained), batches)
    assert (report.search_iterations, report.search_images) == (0, 0)
    assert "learned" not in str(report)


def test_fewer_images_than_a_batch_are_all_shown_every_time(trained):
    few = images(5, seed=2).split(2)
    report = CoRa(learning(iterations=3)).apply(PlainHost(trained), few)
    assert (report.search_iterations, report.search_images) == (3, 4)


def test_it_learns_in_inference_mode(trained, batches):
    with torch.inference_mode():
        report = CoRa(learning(iterations=2)).apply(PlainHost(trained), batches)
    assert report.search_iterations == 2


def test_pinned_ranks_stay_and_their_cost_counts(trained, batches):
    config = {**learning(iterations=5), "budget": 0.1}
    config["ranks"] = {"wide": 3, "mix": 0}
    report = CoRa(config).apply(PlainHost(trained), batches)
    assert {row.name: row.rank for row in report.layers}["wide"] == 3
    assert "mix" in report.skipped
    assert report.budget_used <= report.budget_allowed


def test_all_ranks_pinned_leave_nothing_to_learn(trained, batches):
    config = {**learning(), "budget": 0.9, "ranks": {"*": 1}}
    report = CoRa(config).apply(PlainHost(trained), batches)
    assert report.search_iterations == 0
    assert {row.rank for row in report.layers} == {1}


@pytest.mark.parametrize("settings", [{"gamma": 1.7e308}, {"temperature": 1e-300}])
def test_a_loss_that_is_no_number_stops_and_says_so(trained, batches, settings):
    host = PlainHost(trained)
    before = kl(host)
    with pytest.raises(CoRaError, match=r"loss is (nan|inf) at iteration 1 .*lower"):
        CoRa(learning(**settings)).apply(host, batches)
    assert host.branches == host.given == {}
    assert kl(host) == before


class Interrupted(PlainHost):
    """Its user loses patience in the third iteration."""

    tries = 0

    def run(self, images):
        self.tries += bool(self.given) and torch.is_grad_enabled()
        if self.tries == 3:
            raise KeyboardInterrupt
        return super().run(images)


def test_an_interruption_leaves_the_model_as_it_was(trained, batches):
    host = Interrupted(trained)
    with torch.no_grad():
        before = only(host.run(batches[0]))
    with pytest.raises(KeyboardInterrupt):
        CoRa(learning()).apply(host, batches)
    assert host.tries == 3
    assert host.branches == host.given == {}
    host.tries = 4
    with torch.no_grad():
        assert torch.equal(only(host.run(batches[0])), before)
