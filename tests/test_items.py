"""What loaders yield becomes the arguments of the model."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from cora_plugin import CoRaError
from cora_plugin.batches import Units, joined, pick, samples, signature
from cora_plugin.items import Reader, arguments
from cora_plugin.outputs import run

X, Y = torch.randn(4, 3), torch.randn(4, 3)
LABELS = torch.zeros(4, dtype=torch.int64)


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x, mask=None):
        return x @ self.w if mask is None else (x * mask) @ self.w


class Two(One):
    def forward(self, x, y):
        return (x + y) @ self.w


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(input_ids).sum(-1)


class Listed(nn.Module):
    """Images in a list, as detectors take them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, images):
        if not isinstance(images, list):
            raise TypeError("images is expected to be a list")
        return torch.stack(images).mean((1, 2, 3)) * self.w


TOKENS = {"input_ids": LABELS[:, None]}
IMAGES = [torch.randn(3, 4, 4) for _ in range(5)]


@pytest.mark.parametrize(
    ("model", "item", "read", "said"),
    [
        (One(), X, X, ""),
        (One(), (X,), X, ""),
        (One(), (X, LABELS), X, ""),
        (One(), [X, LABELS, ["a.png"]], X, ""),
        (One(), (X, Y), X, "unpack= says otherwise"),
        (Two(), (X, Y), (X, Y), "first 2 are the model's arguments"),
        (Two(), (X, Y, LABELS), (X, Y), "first 2 are the model's arguments"),
        (Two(), ((X, Y), LABELS), (X, Y), "first 2 are the model's arguments"),
        (Two(), {"x": X, "y": Y}, {"x": X, "y": Y}, ""),
        (Two(), OrderedDict(x=X, y=Y), {"x": X, "y": Y}, ""),
        (One(), {"image": X, "labels": LABELS}, X, "'image' is the input"),
        (One(), {"x": X, "label": LABELS}, {"x": X}, "but for its labels"),
        (Tokens(), TOKENS, TOKENS, ""),
        (Tokens(), ({**TOKENS}, LABELS), TOKENS, "the first element"),
        (Tokens(), LABELS, LABELS, ""),
        (
            Listed(),
            (IMAGES, [LABELS] * 5),
            (IMAGES,),
            "a list, the model's",
        ),
        (Listed(), tuple(IMAGES), (IMAGES,), "a list, the model's"),
        (
            Listed(),
            (tuple(IMAGES), 5 * ({"boxes": Y},)),
            (IMAGES,),
            "a list, the model's",
        ),
    ],
)
def test_an_item_is_read_as_the_model_takes_it(model, item, read, said):
    reader = Reader(lambda batch: run(model, batch))
    for _ in range(2):
        found = reader(item)
        assert type(found) is type(read)
        torch.testing.assert_close(found, read)
    assert said in "".join(reader.notes) and bool(said) == bool(reader.notes)


def test_unpack_has_the_last_word():
    reader = Reader(lambda batch: run(One(), batch), lambda item: (item[0], item[1]))
    assert len(reader((X, Y, LABELS))) == 2
    assert not reader.notes


@pytest.mark.parametrize(
    "item",
    [
        None,
        3,
        "photo.jpg",
        np.zeros((2, 3, 4, 4)),
        [],
        (),
        ("photo.jpg", torch.zeros(2)),
        torch.tensor(3.0),
        torch.zeros(4),
    ],
)
def test_an_item_that_holds_no_data_is_refused(item):
    with pytest.raises(CoRaError, match=r"item 0 is .* images \[N, …\]"):
        Reader()(item)


def test_an_item_that_the_model_does_not_take_is_explained():
    wrong = torch.zeros(2, 5)
    with pytest.raises(CoRaError, match=r"does not run with item 0, a tensor .*unpack"):
        Reader(lambda batch: run(One(), batch))(wrong)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    net = nn.Conv2d(3, 4, 1)
    with pytest.raises(CoRaError, match=r"torch\.uint8 .*preprocessed"):
        Reader(lambda batch: run(net, batch))(images)


@pytest.mark.parametrize("value", ["NaN", "inf", "-inf"])
def test_values_that_are_not_finite_are_refused_by_their_number(value):
    reader = Reader()
    reader(X)
    broken = X.clone()
    broken[2, 0] = float(value)
    with pytest.raises(CoRaError, match=f"item 1 holds {value.lstrip('-')}"):
        reader((broken, None))


def test_a_call_becomes_a_batch():
    forward = Two().forward
    assert arguments(forward, (X,), {}) is not None
    assert len(arguments(forward, (X, Y), {})) == 2
    assert list(arguments(forward, (), {"y": Y, "x": X})) == ["y", "x"]
    assert list(arguments(forward, (X,), {"y": Y})) == ["x", "y"]
    with pytest.raises(CoRaError, match="missing a required argument"):
        arguments(forward, (X,), {"z": Y})
    with pytest.raises(CoRaError, match="pass all of a call's by name"):
        arguments(lambda *a, **k: None, (X,), {"z": Y})


def test_batches_are_picked_and_joined_by_rows():
    batch = {"x": X, "flag": True, "pair": (Y, torch.tensor(2.0))}
    some = pick(batch, [2, 0])
    assert torch.equal(some["x"], X[[2, 0]]) and some["flag"] is True
    assert torch.equal(some["pair"][0], Y[[2, 0]]) and samples(some) == 2
    whole = joined([pick(batch, [0]), pick(batch, [1, 2, 3])])
    torch.testing.assert_close(whole, batch)
    assert signature(some) == signature(batch) != signature(X)
    assert torch.equal(some["pair"][1], batch["pair"][1])


def test_pieces_run_together_by_their_signature():
    units = Units([X[:1], X[:1], Y[:1, :2], X[:1], Y[:1, :2]], True, 2)
    assert units.groups() == [[0, 1], [2, 4], [3]]
    assert units.groups([4, 0, 3, 1], 9) == [[4], [0, 3, 1]]
    assert Units([X, X], False, 9).groups() == [[0], [1]]
    assert units[1:3].rows == 2
