import math

import pytest

from cora_plugin.qat.controller import LARGEST, Controller, State, momentum_for


def test_running_rate():
    """Eq. 10 on numbers: 0.9 · 0.2 + 0.1 · 0.5."""
    state = Controller(0.9, 0.1, 1.0).step(State(0.2, 0.0), 0.5, 0.0)
    assert state.rate == pytest.approx(0.23)


def test_learning_rate():
    """Eq. 11 on numbers, with the running rate of this step: 0.3 + 2 (0.4 − 0.23)."""
    state = Controller(0.9, 0.3, 2.0).step(State(0.2, 0.3), 0.5, 0.4)
    assert state.lr == pytest.approx(0.64)


def test_learning_rate_is_never_negative_and_comes_back():
    controller = Controller(0.0, 0.1, 1.0)
    stopped = controller.step(State(0.0, 0.1), 0.9, 0.1)
    assert stopped.lr == 0
    assert controller.step(stopped, 0.0, 0.1).lr == pytest.approx(0.1)


def test_fixed_point_is_the_target():
    """Where rates grow with the learning rate, the running one ends at the target."""
    controller, state = Controller(0.99, 0.1, 0.1), State(0.0, 0.1)
    for _ in range(5000):
        state = controller.step(state, 0.05 * state.lr, 0.004)
    assert state.rate == pytest.approx(0.004, rel=1e-3)
    assert state.lr == pytest.approx(0.08, rel=1e-3)


@pytest.mark.parametrize("slope", [0.001, 1.0, 1000.0])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_by_itself_it_nears_the_target_and_hardly_swings(slope, momentum):
    """4 % beyond a step of the target, whatever rate a step size brings."""
    target = 0.004
    controller = Controller(momentum, target / slope)
    state = State(target, target / slope)  # settled
    rates = []
    for _ in range(round(12 / (1 - momentum))):
        state = controller.step(state, slope * state.lr, 1.1 * target)
        rates.append(state.rate)
    assert max(rates) < (1.1 + 0.1 * 0.06) * target
    assert state.rate == pytest.approx(1.1 * target, rel=1e-3)


def test_by_itself_it_follows_a_falling_target_within_a_tenth():
    """A cosine over 1,000 steps, from a first step size that is ten times too small."""
    steps, slope, first = 1000, 2.0, 0.01
    controller = Controller(momentum_for(steps), 1e-4)
    state = State(0.0, first * 0.05)
    for step in range(steps):
        target = first * 0.5 * (1 + math.cos(math.pi * step / steps))
        state = controller.step(state, slope * state.lr, target)
        if 300 < step:
            assert abs(state.rate - target) < 0.1 * first


def test_by_itself_a_step_at_most_doubles_and_ends_at_a_bound():
    """Nothing changes codes: the rate stays 0."""
    controller, state = Controller(0.9, 0.1), State(0.0, 0.1)
    for _ in range(50):
        after = controller.step(state, 0.0, 0.01)
        assert after.lr <= 2 * state.lr
        state = after
    assert state.lr == LARGEST * 0.1
    assert controller.step(State(0.0, 0.1), 0.0, 0.0) == State(0.0, 0.1)


def test_short_trainings_average_fewer_steps():
    assert [momentum_for(n) for n in (1, 100, 1000, 10**6)] == [0.5, 0.5, 0.9, 0.99]
