import copy
import logging

import pytest
import torch
from latent_net import batches, groups, latents, net
from torch import nn
from torch.nn import functional

from cora_plugin.adapters.errors import ConfigError, ModelError
from cora_plugin.qat import TransitionRateScheduler

OPTIMIZERS = {
    "sgd": lambda g: torch.optim.SGD(g, 0.05, momentum=0.9),
    "adam": lambda g: torch.optim.Adam(g, 1e-3),
    "adamw": lambda g: torch.optim.AdamW(g, 1e-3),
    "nadam": lambda g: torch.optim.NAdam(g, 1e-3),
}


def backward(model, batch, scale=1.0):
    x, labels = batch
    (scale * functional.cross_entropy(model(x), labels)).backward()


def train(model, optimizer, scheduler, steps, other=None, seed=1):
    for batch in batches(steps, seed):
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if other is not None:
            other.step()


def scheduled(model, name="sgd", **settings):
    optimizer = OPTIMIZERS[name](groups(model, lr=1e-3))
    settings = {"target": 0.02, "steps": 100, **settings}
    return optimizer, TransitionRateScheduler(optimizer, latents(model), **settings)


def test_equations_on_a_known_step():
    """3 of 192 weights change: eqs. 5, 10 and 11 by hand."""
    model = net()
    for layer in (model[0], model[2]):
        layer.weight.data.zero_()
    optimizer, scheduler = scheduled(model, momentum=0.9, eta=2.0, schedule=lambda _: 1)
    slope = torch.zeros_like(model[0].weight)
    slope.view(-1)[:3] = -2.0  # 0.05 · 2 is a step
    model[0].weight.grad = slope
    optimizer.step()
    scheduler.step()
    rate = 3 / 192
    assert scheduler.last.rate == pytest.approx(rate)
    assert scheduler.rate == pytest.approx(0.1 * rate)
    assert scheduler.lr == pytest.approx(0.05 + 2 * (0.02 - 0.1 * rate))
    assert optimizer.param_groups[0]["lr"] == scheduler.lr
    assert scheduler.get_last_lr() == [scheduler.lr, 1e-3]
    assert scheduler.last_epoch == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rate_follows_the_target(name):
    """Within a quarter of it, over the second half of a constant target."""
    model = net()
    optimizer, scheduler = scheduled(
        model, name, target=0.01, steps=1200, schedule=lambda _: 1.0, momentum=0.9
    )
    train(model, optimizer, scheduler, 1200)
    rates = [each.rate for each in scheduler.transitions().steps[600:]]
    assert sum(rates) / len(rates) == pytest.approx(0.01, rel=0.25)


def test_in_a_long_training_the_learning_rate_does_not_shoot_up_first():
    """An average of a hundred steps, and steps whose rate is the target."""
    model = net()
    _, scheduler = scheduled(model, target=0.01, steps=100_000)
    assert scheduler.rate == pytest.approx(0.01)
    first = state = scheduler._state
    for _ in range(200):
        state = scheduler._controller.step(state, 0.01 * state.lr / first.lr, 0.01)
        assert state.lr == pytest.approx(first.lr, rel=1e-3)


def test_other_groups_are_left_to_another_scheduler():
    model = net()
    optimizer, scheduler = scheduled(model)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    used = []
    optimizer.register_step_pre_hook(
        lambda o, *_: used.append([g["lr"] for g in o.param_groups])
    )
    train(model, optimizer, scheduler, 50, other)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5e-3)
    ours = [0.05] + [each.lr for each in scheduler.transitions().steps[:-1]]
    assert [each[0] for each in used] == pytest.approx(ours)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip_in_mid_schedule(name):
    model = net()
    optimizer, scheduler = scheduled(model, name, window=5)
    train(model, optimizer, scheduler, 30)
    again = copy.deepcopy(model)
    other, resumed = scheduled(again, name, window=5)
    # Through a file, as checkpoints go.
    states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    train(model, optimizer, scheduler, 30, seed=2)
    train(again, other, resumed, 30, seed=2)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert scheduler.transitions() == resumed.transitions()
    assert scheduler.last_epoch == 60


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_switched_off_changes_nothing(name):
    model = net()
    plain = copy.deepcopy(model)
    optimizer, scheduler = scheduled(model, name, enabled=False)
    train(model, optimizer, scheduler, 40)
    other = OPTIMIZERS[name](groups(plain, lr=1e-3))
    for batch in batches(40):
        backward(plain, batch)
        other.step()
        other.zero_grad()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)
    assert scheduler.rate > 0  # measured all the same


def test_accumulated_batches_make_one_step():
    model = net()
    twin = copy.deepcopy(model)
    optimizer, scheduler = scheduled(model)
    for number, batch in enumerate(batches(40)):
        backward(model, batch, 0.5)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()  # every batch, which is once too often
    other, same = scheduled(twin)
    pairs = list(batches(40))
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        backward(twin, first, 0.5)
        backward(twin, second, 0.5)
        other.step()
        other.zero_grad()
        same.step()
    assert scheduler.transitions().steps == same.transitions().steps
    assert (scheduler.transitions().skipped, same.transitions().skipped) == (20, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_grad_scaler_skips_count_as_none(fused):
    """A fused optimizer is called all the same, and told to do nothing."""
    model = net()
    optimizer = torch.optim.Adam(groups(model), 1e-3, fused=fused)
    scheduler = TransitionRateScheduler(optimizer, latents(model), 0.02, steps=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for number, (x, labels) in enumerate(batches(10)):
        loss = functional.cross_entropy(model(x), labels)
        scaler.scale(loss * float("inf") if number == 4 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = scheduler.lr
        scheduler.step()
        assert (scheduler.lr == before) == (number == 4)
    assert scheduler.last_epoch == 9
    assert scheduler.transitions().skipped == 1
    assert scheduler.transitions().nonfinite == 0


def test_autocast_and_clipping():
    model = net()
    optimizer, scheduler = scheduled(model, momentum=0.9, steps=400)
    for x, labels in batches(100):
        with torch.autocast("cpu", torch.bfloat16):
            loss = functional.cross_entropy(model(x), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert 0.005 < scheduler.rate < 0.05


def test_gradients_that_are_not_finite_skip_the_step(caplog):
    model = net()
    optimizer, scheduler = scheduled(model)
    train(model, optimizer, scheduler, 3)
    before, lr = copy.deepcopy(model.state_dict()), scheduler.lr
    backward(model, next(batches(1)), float("nan"))
    with caplog.at_level(logging.WARNING, "cora_plugin"):
        optimizer.step()
    scheduler.step()
    assert "not finite: step 4 is skipped" in caplog.text
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert scheduler.lr == lr
    assert scheduler.transitions().nonfinite == 1
    train(model, optimizer, scheduler, 1)
    assert scheduler.last_epoch == 4


def test_a_target_out_of_reach_is_reported_once_within_the_training(caplog):
    model = net()
    optimizer, scheduler = scheduled(model, target=0.9, eta=1e-9, schedule=lambda _: 1)
    with caplog.at_level(logging.WARNING, "cora_plugin"):
        train(model, optimizer, scheduler, 100)
    assert caplog.text.count("for 20 steps now: it cannot be reached") == 1


@pytest.mark.parametrize(("steps", "measured"), [(5, 5), (60, 20), (200, 20)])
def test_short_trainings_have_shares_by_step_as_well(steps, measured):
    model = net()
    optimizer, scheduler = scheduled(model, steps=steps, window=3)
    train(model, optimizer, scheduler, steps)
    found = [e for e in scheduler.transitions().steps if e.oscillating is not None]
    assert len(found) == measured
    assert all(each.near is not None for each in found)


def test_another_schedulers_warmup_is_not_the_first_learning_rate():
    """It begins at 0, as those of transformers do."""
    model = net()
    optimizer = OPTIMIZERS["sgd"](groups(model))
    other = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    scheduler = TransitionRateScheduler(optimizer, latents(model), 0.02, steps=100)
    assert scheduler.lr == 0.05
    train(model, optimizer, scheduler, 5, other)
    assert sum(each.rate for each in scheduler.transitions().steps) > 0
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.025)


def test_a_first_learning_rate_of_zero_is_refused():
    model = net()
    optimizer = torch.optim.SGD(groups(model), 0.0)
    with pytest.raises(ConfigError, match="learning rate of latent weights is 0"):
        TransitionRateScheduler(optimizer, latents(model), steps=10)
    TransitionRateScheduler(optimizer, latents(model), steps=10, enabled=False)


def test_a_learning_rate_in_a_tensor_is_not_that_of_other_groups():
    model = net()
    optimizer = torch.optim.Adam(groups(model), torch.tensor(1e-3), foreach=False)
    scheduler = TransitionRateScheduler(optimizer, latents(model), 0.02, steps=100)
    train(model, optimizer, scheduler, 3)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(scheduler.lr)
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(1e-3)


def test_the_first_learning_rate_is_resumed_after_an_optimizer_that_was():
    """What bounds the learning rate, and is named in warnings."""
    model = net()
    optimizer, scheduler = scheduled(model)
    train(model, optimizer, scheduler, 30)
    other = OPTIMIZERS["sgd"](groups(model))
    other.load_state_dict(optimizer.state_dict())
    resumed = TransitionRateScheduler(other, latents(model), 0.02, steps=100)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed._controller == scheduler._controller


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, float("nan"), "0.1", None])
def test_target_out_of_range(target):
    with pytest.raises(ConfigError, match=r"target: .* above 0 and below 1"):
        scheduled(net(), target=target)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"steps": None},
        {"warmup": 100},
        {"momentum": 1.0},
        {"eta": 0.0},
        {"window": -1},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: "):
        scheduled(net(), **wrong)


@pytest.mark.parametrize("factor", [float("nan"), -1.0])
def test_a_schedule_that_gives_no_target_is_refused(factor):
    model = net()
    optimizer, scheduler = scheduled(
        model, schedule=lambda done: factor if done >= 0.02 else 1.0
    )
    with pytest.raises(ConfigError, match=f"schedule: it gives {factor} at 0.02"):
        train(model, optimizer, scheduler, 5)
    with pytest.raises(ConfigError, match=f"schedule: it gives {factor} at 0;"):
        scheduled(model, schedule=lambda done: factor)


def test_models_of_double_precision():
    model = net().double()
    optimizer, scheduler = scheduled(model)
    x, labels = next(iter(batches(1)))
    functional.cross_entropy(model(x.double()), labels).backward()
    optimizer.step()
    scheduler.step()
    assert scheduler.last_epoch == 1


def test_weights_that_the_optimizer_lacks_are_named():
    model = net()
    optimizer = torch.optim.SGD([model[0].weight], 0.1)
    with pytest.raises(ModelError, match=r"weights of 2 \(1 of 2.*param_groups"):
        TransitionRateScheduler(optimizer, latents(model), steps=10)


def test_groups_that_mix_weights_with_others_are_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ModelError, match="2 other parameters beside latent"):
        TransitionRateScheduler(optimizer, latents(model), steps=10)


def test_several_learning_rates_are_refused():
    model = net()
    apart = [{"params": [model[0].weight]}, {"params": [model[2].weight], "lr": 1.0}]
    with pytest.raises(ConfigError, match=r"rates \[0.1, 1.0\]"):
        TransitionRateScheduler(torch.optim.SGD(apart, 0.1), latents(model), steps=10)


def test_a_model_of_no_toolkit_is_refused():
    model = net()
    optimizer = torch.optim.SGD(groups(model), 0.1)
    with pytest.raises(ModelError, match="quantized by no toolkit"):
        TransitionRateScheduler(optimizer, model, steps=10)


def test_closed_it_counts_no_more():
    model = net()
    optimizer, scheduler = scheduled(model)
    with scheduler:
        train(model, optimizer, scheduler, 3)
    optimizer.param_groups[0]["lr"] = 0.5
    backward(model, next(batches(1)))
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
