import pytest

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.qat.schedule import SCHEDULES, schedule_of, target_at


@pytest.mark.parametrize(
    ("name", "halfway", "late"),
    [("cosine", 0.5, 0.0955), ("linear", 0.5, 0.2), ("step", 0.1, 0.01)],
)
def test_each_falls_from_the_target(name, halfway, late):
    at = SCHEDULES[name]
    assert at(0.0) == 1
    assert at(0.5) == pytest.approx(halfway)
    assert at(0.8) == pytest.approx(late, abs=1e-4)
    assert at(1.0) == pytest.approx(0.01 if name == "step" else 0)


def test_warm_up_comes_before_the_schedule():
    linear = SCHEDULES["linear"]
    rates = [target_at(step, 0.4, linear, steps=13, warmup=3) for step in range(15)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[8] == pytest.approx(0.2)
    assert rates[13:] == [0, 0]  # past the end it stays


def test_a_function_is_taken_as_it_is():
    half = schedule_of(lambda done: 0.5)
    assert target_at(7, 0.2, half, 10, 0) == pytest.approx(0.1)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"schedule: .*'cosin'.*cosine"):
        schedule_of("cosin")
