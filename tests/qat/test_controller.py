import pytest

from cora_plugin.qat.controller import Controller, State


def test_running_rate():
    """Eq. 10 on numbers: 0.9 · 0.2 + 0.1 · 0.5."""
    state = Controller(0.9, 1.0).step(State(0.2, 0.0), 0.5, 0.0)
    assert state.rate == pytest.approx(0.23)


def test_learning_rate():
    """Eq. 11 on numbers, with the running rate of this step: 0.3 + 2 (0.4 − 0.23)."""
    state = Controller(0.9, 2.0).step(State(0.2, 0.3), 0.5, 0.4)
    assert state.lr == pytest.approx(0.64)


def test_learning_rate_is_never_negative_and_comes_back():
    controller = Controller(0.0, 1.0)
    stopped = controller.step(State(0.0, 0.1), 0.9, 0.1)
    assert stopped.lr == 0
    assert controller.step(stopped, 0.0, 0.1).lr == pytest.approx(0.1)


def test_fixed_point_is_the_target():
    """Where rates grow with the learning rate, the running one ends at the target."""
    controller, state = Controller(0.99, 0.1), State(0.0, 0.1)
    for _ in range(5000):
        state = controller.step(state, 0.05 * state.lr, 0.004)
    assert state.rate == pytest.approx(0.004, rel=1e-3)
    assert state.lr == pytest.approx(0.08, rel=1e-3)
