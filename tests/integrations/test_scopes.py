from contextlib import contextmanager

import pytest
from torch import nn

from cora_plugin.integrations.scopes import flagged, flags_within


class Quantizer(nn.Module):
    disabled = None

    def __init__(self):
        super().__init__()
        self.disabled = False
        self.observes = True


@contextmanager
def off(net):
    for module in net:
        module.disabled = True
        module.train(False)
    yield
    for module in net:
        module.disabled = False
        module.train(True)


def state(net):
    return [(e.disabled, e.observes, e.training) for e in net]


def test_flags_do_what_the_scope_does_and_end_with_it():
    net = nn.Sequential(Quantizer(), Quantizer())
    net[1].eval()
    before = state(net)
    flags = flags_within(off(net), net)
    assert [(m is net[0], name) for m, name, _ in flags] == [
        (True, "training"),
        (True, "disabled"),
        (False, "disabled"),
    ]
    net[1].eval()
    with pytest.raises(ValueError, match="within"), flagged(flags):
        assert state(net) == [(True, True, False), (True, True, False)]
        raise ValueError("within")
    assert state(net) == before


def test_they_can_be_set_one_within_another():
    net = nn.Sequential(Quantizer())
    flags = flags_within(off(net), net)
    with flagged(flags):
        with flagged(flags):
            pass
        assert net[0].disabled
    assert not net[0].disabled
