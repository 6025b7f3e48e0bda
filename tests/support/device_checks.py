"""What runs on every device, and what two devices must agree on."""

import pytest

SETTINGS = {
    "default": {},
    "learned": {
        "search": "butterworth",
        "butterworth": {"iterations": 5, "adapter_lr": 0.01},
        "refine": {"iterations": 4, "every": 2},
    },
}
"""Settings by name: between them they run every part of the algorithm."""


def all_settings(test):
    settings = [{"budget": 0.3, **each} for each in SETTINGS.values()]
    return pytest.mark.parametrize("settings", settings, ids=[*SETTINGS])(test)


def devices(model):
    """The kinds of devices on which a model's parameters are."""
    return {parameter.device.type for parameter in model.parameters()}


def found(report):
    """What a run came to: its ranks and distances."""
    return [row.rank for row in report.layers], report.before.kl, report.after.kl


def agree(one, other):
    """Whether two devices came to the same, up to how they round float32."""
    pairs = zip(one.layers, other.layers, strict=True)
    assert all(abs(a.rank - b.rank) <= 1 for a, b in pairs), (found(one), found(other))
    assert other.before.kl == pytest.approx(one.before.kl, rel=0.05, abs=1e-6)
    # What is left of it hangs on single activations that round to another code.
    left = 0.01 * one.before.kl
    assert other.after.kl == pytest.approx(one.after.kl, rel=0.25, abs=left)
