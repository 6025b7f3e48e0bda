import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import abelian_process
import pytest
import torch
from torch import nn

from cora_plugin.adapters import AbelianSum, isomorphic
from cora_plugin.adapters.errors import CoRaError


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    ).eval()


@pytest.fixture
def x():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_more_terms_are_nearer_to_the_float_network(x):
    expected = net()(x)
    errors = [
        float((isomorphic(net(), 3, terms)(x) - expected).abs().max())
        for terms in (1, 2, 3, 4)
    ]
    for before, after in pairwise(errors):
        assert after < before / 3
    assert errors[-1] < 1e-3


def test_layers_of_every_kind_are_expanded():
    kinds = {type(m) for m in net() if m.state_dict()} - {nn.BatchNorm2d}
    sums = [m for m in isomorphic(net(), 3, 2) if isinstance(m, AbelianSum)]
    assert {type(each.members[0]) for each in sums} == kinds


@torch.no_grad()
def test_members_add_up_in_any_order_and_in_threads(x):
    expected = isomorphic(net(), 4, 3)(x)
    with ThreadPoolExecutor(3) as pool:
        found = isomorphic(net(), 4, 3, each=pool.map)(x)
    torch.testing.assert_close(found, expected)
    turned = isomorphic(net(), 4, 3, mine=(2, 0, 1))(x)
    torch.testing.assert_close(turned, expected)


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without processes"
)
def test_two_processes_give_what_one_does(tmp_path):
    meet = tmp_path / "meet"
    both = [
        subprocess.Popen([sys.executable, abelian_process.__file__, str(rank), meet])
        for rank in range(2)
    ]
    assert [each.wait(timeout=240) for each in both] == [0, 0]
    expected = isomorphic(abelian_process.net(), 4, 2)(abelian_process.images())
    for rank in range(2):
        torch.testing.assert_close(torch.load(f"{meet}-{rank}"), expected)


@torch.no_grad()
def test_layers_of_members_add_up_to_the_layer(x):
    layer = net()[0]
    parts = [isomorphic(layer, 4, 2, mine=(index,))(x) for index in (0, 1)]
    whole = isomorphic(layer, 4, 2)
    assert isinstance(whole, AbelianSum)
    torch.testing.assert_close(parts[0] + parts[1], whole(x))


def test_the_network_stays_as_it_is():
    given = net()
    before = {k: v.clone() for k, v in given.state_dict().items()}
    isomorphic(given, 2, 2)
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())
    assert all(p.requires_grad for p in given.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.ReLU(), 4, 2), "no linear layer"),
        ((net(), 4, 2, (2,)), r"mine=\(2,\) of 2 terms"),
        ((net(), 4, 2, ()), r"mine=\(\)"),
        ((net(), 1, 2), "bits=1"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(CoRaError, match=message):
        isomorphic(*arguments)
