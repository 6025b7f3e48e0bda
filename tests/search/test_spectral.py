import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from options import candidate, costs, gains, ranks

from cora_plugin import CoRaError, search
from cora_plugin.adapters import Form, Kind
from cora_plugin.config import ButterworthConfig
from cora_plugin.search import Candidate, Option, Treatment

# What is smaller than this, divided by a cost, is no number any more.
SHARES = st.floats(0, 1, allow_subnormal=False)


@st.composite
def any_candidates(draw):
    """Ascending costs and gains, concave or not; a further rank may cost nothing."""
    made = []
    for index in range(draw(st.integers(1, 4))):
        steps = draw(st.integers(1, 4))
        costs = draw(st.lists(st.integers(0, 9), min_size=steps, max_size=steps))
        costs[0] += 1
        gains = draw(st.lists(SHARES, min_size=steps, max_size=steps))
        made.append(_candidate(index, costs, gains))
    return made


@st.composite
def concave_candidates(draw, price=None):
    """What a rank buys a unit of cost only falls, as with singular values."""
    made = []
    for index in range(draw(st.integers(1, 4))):
        steps = draw(st.integers(1, 4))
        costs = draw(st.lists(st.integers(1, 9), min_size=steps, max_size=steps))
        if price is not None:
            costs = [price] * steps
        rates = sorted(
            draw(st.lists(st.integers(0, 20), min_size=steps, max_size=steps)),
            reverse=True,
        )
        gains = [rate * cost for rate, cost in zip(rates, costs, strict=True)]
        made.append(_candidate(index, costs, gains))
    return made


def _candidate(index, prices, shares):
    total = [
        tuple(itertools.accumulate(steps, initial=0)) for steps in (prices, shares)
    ]
    return candidate(f"layer{index}", tuple(range(len(prices) + 1)), *total)


def spectral(candidates, budget):
    return ranks(search.spectral(candidates, budget))


def uniform(candidates, budget):
    return ranks(search.uniform(candidates, budget))


def of(candidates, chosen, field):
    return sum(field(c)[c.ranks.index(chosen[c.name])] for c in candidates)


def best(candidates, budget):
    """The most that any choice within the budget gains."""
    return max(
        sum(gains(c)[i] for c, i in zip(candidates, rungs, strict=True))
        for rungs in itertools.product(*(range(len(c.ranks)) for c in candidates))
        if sum(costs(c)[i] for c, i in zip(candidates, rungs, strict=True)) <= budget
    )


def largest_step(candidates):
    return max(b - a for c in candidates for a, b in itertools.pairwise(gains(c)))


@given(any_candidates(), st.floats(0, 60))
def test_the_budget_is_never_exceeded(candidates, budget):
    assert of(candidates, spectral(candidates, budget), costs) <= budget


@given(any_candidates(), st.floats(0, 60))
def test_nothing_that_helps_and_still_fits_is_left(candidates, budget):
    chosen = spectral(candidates, budget)
    left = budget - of(candidates, chosen, costs)
    for each in candidates:
        at = each.ranks.index(chosen[each.name])
        for rung in range(at + 1, len(each.ranks)):
            fits = costs(each)[rung] - costs(each)[at] <= left
            helps = gains(each)[rung] > gains(each)[at]
            assert not (fits and helps)


@given(concave_candidates(), st.integers(0, 60))
def test_it_is_optimal_up_to_the_last_step(candidates, budget):
    gained = of(candidates, spectral(candidates, budget), gains)
    assert gained >= best(candidates, budget) - largest_step(candidates)


@given(concave_candidates(price=3), st.integers(0, 60))
def test_it_is_optimal_where_all_steps_cost_the_same(candidates, budget):
    chosen = spectral(candidates, budget)
    assert of(candidates, chosen, gains) == best(candidates, budget)
    assert of(candidates, chosen, gains) >= of(
        candidates, uniform(candidates, budget), gains
    )


def test_it_gains_more_than_uniform_on_spectra_like_those_of_layers():
    for seed in range(50):
        draw = random.Random(seed)
        layers = []
        for index in range(8):
            rank, price = draw.randint(8, 64), draw.randint(20, 400)
            size, decay = 10 ** draw.uniform(-3, 1), draw.uniform(0.7, 0.99)
            shares = [size * decay**i for i in range(rank)]
            layers.append(_candidate(index, [price] * rank, shares))
        whole = sum(costs(layer)[-1] for layer in layers)
        for share in (0.02, 0.05, 0.2, 0.6):
            ours, theirs = (
                of(layers, choose(layers, share * whole), gains)
                for choose in (spectral, uniform)
            )
            assert ours >= theirs, (seed, share)


@given(concave_candidates(), st.integers(0, 60), st.integers(0, 10))
def test_a_larger_budget_gains_no_less_than_a_step_less(candidates, budget, more):
    low, high = (
        of(candidates, spectral(candidates, b), gains) for b in (budget, budget + more)
    )
    assert high >= low - largest_step(candidates)


@given(any_candidates(), st.floats(0, 60))
def test_the_order_of_the_layers_does_not_matter(candidates, budget):
    expected = spectral(candidates, budget)
    assert spectral(candidates, budget) == expected
    assert spectral(candidates[::-1], budget) == expected


def test_a_layer_without_gain_gets_nothing():
    dead = candidate("dead", (0, 1, 2), (0, 1, 2), (0.0, 0.0, 0.0))
    live = candidate("live", (0, 1, 2), (0, 1, 2), (0.0, 1.0, 1.5))
    assert spectral([dead, live], 10) == {"dead": 0, "live": 2}


def test_a_jump_that_only_pays_whole_is_taken_whole():
    # Two ranks buy next to nothing; the residual itself, the last rung, buys all.
    steep = candidate("steep", (0, 1, 2, 9), (0, 4, 8, 9), (0.0, 0.1, 0.2, 9.0))
    flat = candidate("flat", (0, 1, 2), (0, 4, 8), (0.0, 2.0, 3.0))
    assert spectral([steep, flat], 13) == {"steep": 9, "flat": 1}


def test_ranks_that_cost_nothing_more_are_taken():
    # A shared basis of any rank is one convolution, of the same MACs.
    flat = candidate("flat", (0, 1, 2, 3), (0, 7, 7, 7), (0.0, 1.0, 1.5, 1.6))
    assert spectral([flat], 6) == {"flat": 0}
    assert spectral([flat], 7) == {"flat": 3}


def test_no_layer_to_choose_for_is_no_choice():
    assert spectral([], 5) == {}


def test_bit_widths_and_several_terms_compete_with_ranks():
    whole, rank = Form.whole(4, (64, 64)), Form(Kind.LOW_RANK, 2, 4, (64, 64))
    treatments = [
        Treatment(),
        Treatment((rank,)),
        Treatment(weight_bits=8),
        Treatment((rank, whole)),
    ]
    options = tuple(map(Option, treatments, (0, 2, 4, 7), (0.0, 3.0, 5.0, 5.5)))
    layers = [Candidate("layer", options)]
    chosen = [search.spectral(layers, b)["layer"].treatment for b in (3, 5, 9)]
    assert chosen == treatments[1:]
    for choose in (
        search.uniform,
        search.Butterworth(ButterworthConfig(), 0, None, 1.0),
    ):
        with pytest.raises(CoRaError, match="layer: a treatment with a bit width"):
            choose(layers, 5)
