from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from options import candidate, costs, ranks

from cora_plugin import search


def uniform(candidates, budget):
    return ranks(search.uniform(candidates, budget))


@st.composite
def candidates(draw):
    made = []
    for index in range(draw(st.integers(1, 5))):
        full = draw(st.integers(1, 60))
        inner = draw(st.sets(st.integers(1, full), max_size=8)) | {full}
        rungs = (0, *sorted(inner))
        price = draw(st.integers(1, 50))
        made.append(candidate(f"layer{index}", rungs, [price * r for r in rungs]))
    return made


def cost(candidates, chosen):
    return sum(costs(c)[c.ranks.index(chosen[c.name])] for c in candidates)


def rounded_down(candidates, fraction):
    return {
        c.name: max(r for r in c.ranks if r <= fraction * c.ranks[-1])
        for c in candidates
    }


@given(candidates(), st.floats(0, 10_000))
def test_it_is_the_largest_fraction_that_the_budget_holds(candidates, budget):
    chosen = uniform(candidates, budget)
    assert cost(candidates, chosen) <= budget
    fractions = {Fraction(r, c.ranks[-1]) for c in candidates for r in c.ranks}
    affordable = (
        rounded_down(candidates, fraction)
        for fraction in sorted(fractions)
        if cost(candidates, rounded_down(candidates, fraction)) <= budget
    )
    *_, largest = affordable
    assert chosen == largest


@given(candidates(), st.floats(0, 10_000))
def test_the_order_of_the_layers_does_not_matter(candidates, budget):
    assert uniform(candidates, budget) == uniform(candidates[::-1], budget)


def test_layers_of_the_same_size_get_the_same_rank():
    layers = [candidate(n, (0, 1, 2, 3, 4), (0, 5, 10, 15, 20)) for n in "abc"]
    assert uniform(layers, 44) == {"a": 2, "b": 2, "c": 2}


def test_no_layer_to_choose_for_is_no_choice():
    assert uniform([], 5) == {}


def test_every_rank_of_a_layer_alone_can_be_bought():
    for full in range(1, 110):
        rungs = tuple(range(full + 1))
        for rank in rungs:
            assert uniform([candidate("a", rungs, rungs)], rank) == {"a": rank}
