"""An interrupted search goes on where it was, and ends where it would have."""

import json
from random import Random

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, net

from cora_plugin import CoRa, CoRaError
from cora_plugin.adapters.errors import FileError
from cora_plugin.outputs import only
from cora_plugin.search.checkpoint import State


class Interrupted(PlainHost):
    """Is stopped by its user after some weights have been tried."""

    left = 25

    def acting(self, weights=None, shifts=None, quantized=True):
        if any(value.requires_grad for value in (weights or {}).values()):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return super().acting(weights, shifts, quantized)


def config(path, **changes):
    settings = {"iterations": 40, "checkpoint": path, **changes}
    return {"budget": 0.2, "search": "butterworth", "butterworth": settings}


@pytest.mark.parametrize("adapter_lr", [0.0, 0.01])
def test_an_interrupted_search_ends_where_it_would_have(tmp_path, adapter_lr):
    changes = {"adapter_lr": adapter_lr}
    whole = CoRa(config(None, **changes)).apply(PlainHost(net()), batches())
    path, host = str(tmp_path / "search.pt"), Interrupted(net())
    with pytest.raises(KeyboardInterrupt):
        CoRa(config(path, **changes)).apply(host, batches())
    assert not host.branches
    host = PlainHost(net())
    resumed = CoRa(config(path, **changes)).apply(host, batches())
    assert resumed.search_iterations == 15
    assert [row.rank for row in resumed.layers] == [row.rank for row in whole.layers]
    assert resumed.after.kl == whole.after.kl


def test_a_finished_search_is_not_repeated(tmp_path):
    path = str(tmp_path / "search.pt")
    first = CoRa(config(path)).apply(PlainHost(net()), batches())
    again = CoRa(config(path)).apply(PlainHost(net()), batches())
    assert again.search_iterations == 0
    assert again.after == first.after


def test_a_search_can_be_given_more_iterations(tmp_path):
    path = str(tmp_path / "search.pt")
    CoRa(config(path, iterations=25)).apply(PlainHost(net()), batches())
    longer = CoRa(config(path)).apply(PlainHost(net()), batches())
    assert longer.search_iterations == 15
    whole = CoRa(config(None)).apply(PlainHost(net()), batches())
    assert longer.after == whole.after


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    path = tmp_path / "search.pt"
    CoRa(config(str(path))).apply(PlainHost(net()), batches())
    for changes, key in [({"lr": 0.02}, "lr"), ({"order": 2}, "order")]:
        with pytest.raises(CoRaError, match=f"is of a search with {key} "):
            CoRa(config(str(path), **changes)).apply(PlainHost(net()), batches())
    with pytest.raises(CoRaError, match="is of a search with images"):
        CoRa(config(str(path))).apply(PlainHost(net()), batches(seed=3))


@pytest.fixture
def state():
    """What a search of a few iterations moves, and its state."""
    parameter = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([parameter])
    made = State(optimizer, json.dumps({"lr": 1}))
    for iteration in range(1, 6):
        parameter.square().sum().backward()
        optimizer.step()
        made.iteration = iteration
    return made


def fresh():
    return State(torch.optim.Adam([torch.ones(3)]), json.dumps({"lr": 1}))


def test_a_damaged_checkpoint_is_refused(state, tmp_path):
    path = tmp_path / "search.pt"
    state.save(str(path))
    content = path.read_bytes()
    assert fresh().resume(str(path), 5) == 5
    random = Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        bit = random.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"search\.pt: is (damaged|not a readable)"):
            fresh().resume(str(path), 5)
    for length in (0, 10, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(FileError, match=r"search\.pt: is (damaged|not a readable)"):
            fresh().resume(str(path), 5)


def test_a_folder_is_no_checkpoint_and_its_folder_must_exist(tmp_path):
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        fresh().resume(str(tmp_path), 5)
    with pytest.raises(FileError, match=r"the folder .*nowhere does not exist"):
        fresh().resume(str(tmp_path / "nowhere" / "search.pt"), 5)


def test_fewer_iterations_than_were_done_are_refused(state, tmp_path):
    path = str(tmp_path / "search.pt")
    state.save(path)
    with pytest.raises(FileError, match=r"has done 5 iterations, and 4 are asked for"):
        fresh().resume(path, 4)


def test_half_an_iteration_is_not_written(state, tmp_path):
    path = tmp_path / "search.pt"
    state.save(str(path))
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), state.kept(str(path)):
        state._optimizer.step()
        raise KeyboardInterrupt
    assert path.read_bytes() == before


def test_adapters_can_be_trained_with_the_cutoffs():
    images = batches(1, seed=9)[0]
    found = []
    for rate in (0.0, 0.01):
        host = PlainHost(net(), bits=2)
        changes = {"adapter_lr": rate, "iterations": 60}
        CoRa(config(None, **changes)).apply(host, batches())
        with torch.no_grad():
            found.append(
                (host.float_net(images) - only(host.run(images))).square().mean()
            )
    assert found[1] < found[0]
