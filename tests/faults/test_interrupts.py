"""Interrupts at random moments; `--faults 200` makes as many for each host.

A model is as it was, bit for bit, or whole with its adapters, and torch is itself.
"""

import copy
import gc
import signal
import time
from random import Random

import pytest
import torch
from interrupted_net import CONFIG, HOSTS, data, net
from torch.overrides import _get_current_function_mode_stack


def state(model):
    """All that a user could see of a model, in values that can be compared."""
    modules = {
        name: (type(module).__qualname__, module.training, sorted(vars(module)))
        for name, module in model.named_modules()
    }
    flags = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | str)
    }
    gradients = {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.no_grad():
        outputs = model(data()[0])
    tensors = {**model.state_dict(), "outputs": getattr(outputs, "value", outputs)}
    values = {name: t.flatten().tolist() for name, t in tensors.items()}
    return modules, flags, gradients, values


def interrupted(model, apply, seconds):
    """Apply, and interrupt after some seconds; say whether that came in between.

    In the middle of a library's C code it may come out as another error.
    """
    came = False

    def interrupt(*_):
        nonlocal came
        came = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        apply(model)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return False
    except (Exception, KeyboardInterrupt):
        if not came:
            raise
        return True
    finally:
        # After another error the alarm is still to come, and would end the process.
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def applied(host, model, tmp_path):
    return lambda tried: host.apply(tried, data(), CONFIG)


def loaded(host, model, tmp_path):
    """Puts adapters of a file into a model."""
    path, whole = tmp_path / "adapters.safetensors", copy.deepcopy(model)
    host.apply(whole, data(), CONFIG)
    host.save(path, whole)
    return lambda tried: host.load(path, tried, data()[0])


def collected(host, model, tmp_path):
    """Brevitas' mode, in which the caller runs the model."""

    def apply(tried):
        with torch.no_grad(), host.functions.cora_mode(tried, CONFIG) as cora:
            for images in data():
                cora.model(images)

    return apply


WAYS = [(host, way) for host in HOSTS for way in (applied, loaded)]
WAYS.append((HOSTS[0], collected))


@pytest.mark.parametrize(("host", "way"), WAYS)
def test_no_interrupt_leaves_a_changed_model(host, way, faults, tmp_path):
    model = host.quantized(net(), data())
    apply = way(host, model, tmp_path)
    # Of a copy: a copied GraphModule's containers are in training mode.
    as_it_was, whole = state(copy.deepcopy(model)), copy.deepcopy(model)
    apply(whole)  # The first time takes longer.
    whole = copy.deepcopy(model)
    begin = time.perf_counter()
    apply(whole)
    seconds = time.perf_counter() - begin
    adapted = state(whole)
    random, count = Random(0), 0
    for _ in range(faults(8)):
        tried = copy.deepcopy(model)
        gradients = torch.is_grad_enabled()
        came = interrupted(tried, apply, random.uniform(0.001, seconds))
        gc.collect()
        count += came
        assert _get_current_function_mode_stack() == []
        assert torch.is_grad_enabled() is gradients
        assert state(tried) in ((as_it_was, adapted) if came else (adapted,))
    assert count > 0


@pytest.mark.parametrize("host", HOSTS)
def test_an_error_while_the_report_is_made_leaves_the_model(host, monkeypatch):
    from cora_plugin.residuals import Residuals

    def broken(*_):
        raise MemoryError("while the report is made")

    model, apply = host(net(), data())
    before = state(model)
    monkeypatch.setattr(Residuals, "row", broken)
    with pytest.raises(MemoryError):
        apply(model)
    assert state(model) == before


@pytest.mark.parametrize("host", HOSTS)
def test_adapters_depend_on_no_global_state_and_leave_it(host):
    model, apply = host(net(), data())
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    apply(plain)
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        apply(other)
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), expected)
    assert state(plain)[3] == state(other)[3]
