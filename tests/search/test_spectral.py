import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from cora_plugin.search import Candidate, spectral, uniform

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


def _candidate(index, costs, gains):
    total = [tuple(itertools.accumulate(steps, initial=0)) for steps in (costs, gains)]
    return Candidate(f"layer{index}", tuple(range(len(costs) + 1)), *total)


def of(candidates, ranks, field):
    return sum(getattr(c, field)[c.ranks.index(ranks[c.name])] for c in candidates)


def best(candidates, budget):
    """The most that any choice within the budget gains."""
    return max(
        sum(c.gains[i] for c, i in zip(candidates, rungs, strict=True))
        for rungs in itertools.product(*(range(len(c.ranks)) for c in candidates))
        if sum(c.costs[i] for c, i in zip(candidates, rungs, strict=True)) <= budget
    )


def largest_step(candidates):
    return max(b - a for c in candidates for a, b in itertools.pairwise(c.gains))


@given(any_candidates(), st.floats(0, 60))
def test_the_budget_is_never_exceeded(candidates, budget):
    assert of(candidates, spectral(candidates, budget), "costs") <= budget


@given(any_candidates(), st.floats(0, 60))
def test_nothing_that_helps_and_still_fits_is_left(candidates, budget):
    chosen = spectral(candidates, budget)
    left = budget - of(candidates, chosen, "costs")
    for candidate in candidates:
        at = candidate.ranks.index(chosen[candidate.name])
        for rung in range(at + 1, len(candidate.ranks)):
            fits = candidate.costs[rung] - candidate.costs[at] <= left
            helps = candidate.gains[rung] > candidate.gains[at]
            assert not (fits and helps)


@given(concave_candidates(), st.integers(0, 60))
def test_it_is_optimal_up_to_the_last_step(candidates, budget):
    gained = of(candidates, spectral(candidates, budget), "gains")
    assert gained >= best(candidates, budget) - largest_step(candidates)


@given(concave_candidates(price=3), st.integers(0, 60))
def test_it_is_optimal_where_all_steps_cost_the_same(candidates, budget):
    chosen = spectral(candidates, budget)
    assert of(candidates, chosen, "gains") == best(candidates, budget)
    assert of(candidates, chosen, "gains") >= of(
        candidates, uniform(candidates, budget), "gains"
    )


def test_it_gains_more_than_uniform_on_spectra_like_those_of_layers():
    for seed in range(50):
        draw = random.Random(seed)
        layers = []
        for index in range(8):
            rank, price = draw.randint(8, 64), draw.randint(20, 400)
            size, decay = 10 ** draw.uniform(-3, 1), draw.uniform(0.7, 0.99)
            gains = [size * decay**i for i in range(rank)]
            layers.append(_candidate(index, [price] * rank, gains))
        whole = sum(layer.costs[-1] for layer in layers)
        for share in (0.02, 0.05, 0.2, 0.6):
            ours, theirs = (
                of(layers, search(layers, share * whole), "gains")
                for search in (spectral, uniform)
            )
            assert ours >= theirs, (seed, share)


@given(concave_candidates(), st.integers(0, 60), st.integers(0, 10))
def test_a_larger_budget_gains_no_less_than_a_step_less(candidates, budget, more):
    low, high = (
        of(candidates, spectral(candidates, b), "gains")
        for b in (budget, budget + more)
    )
    assert high >= low - largest_step(candidates)


@given(any_candidates(), st.floats(0, 60))
def test_the_order_of_the_layers_does_not_matter(candidates, budget):
    expected = spectral(candidates, budget)
    assert spectral(candidates, budget) == expected
    assert spectral(candidates[::-1], budget) == expected


def test_a_layer_without_gain_gets_nothing():
    dead = Candidate("dead", (0, 1, 2), (0, 1, 2), (0.0, 0.0, 0.0))
    live = Candidate("live", (0, 1, 2), (0, 1, 2), (0.0, 1.0, 1.5))
    assert spectral([dead, live], 10) == {"dead": 0, "live": 2}


def test_a_jump_that_only_pays_whole_is_taken_whole():
    # Two ranks buy next to nothing; the residual itself, the last rung, buys all.
    steep = Candidate("steep", (0, 1, 2, 9), (0, 4, 8, 9), (0.0, 0.1, 0.2, 9.0))
    flat = Candidate("flat", (0, 1, 2), (0, 4, 8), (0.0, 2.0, 3.0))
    assert spectral([steep, flat], 13) == {"steep": 9, "flat": 1}


def test_ranks_that_cost_nothing_more_are_taken():
    # A shared basis of any rank is one convolution, of the same MACs.
    flat = Candidate("flat", (0, 1, 2, 3), (0, 7, 7, 7), (0.0, 1.0, 1.5, 1.6))
    assert spectral([flat], 6) == {"flat": 0}
    assert spectral([flat], 7) == {"flat": 3}


def test_no_layer_to_choose_for_is_no_choice():
    assert spectral([], 5) == {}
