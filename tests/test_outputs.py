"""Any forward's answer becomes tensors by name."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from cora_plugin.adapters.errors import ModelError
from cora_plugin.outputs import joined, named, only, rows, run

ONE, TWO = torch.zeros(4, 2), torch.ones(4, 3)
Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (ONE, [""]),
        ((ONE,), [""]),
        ([ONE, TWO], ["0", "1"]),
        ({"logits": ONE}, ["logits"]),
        (OrderedDict(a=ONE, b=(TWO, ONE)), ["a", "b.0", "b.1"]),
        (Pair(ONE, {"x": TWO, "none": None}), ["0", "1.x"]),
    ],
)
def test_tensors_are_named_by_where_they_are(answer, names):
    assert list(named(answer)) == names


def test_an_answer_without_tensors_is_refused():
    with pytest.raises(ModelError, match="output is dict, without a tensor"):
        named({"loss": 1.0})
    with pytest.raises(ModelError, match=r"2 tensors \(0, 1\), not logits"):
        only(named((ONE, TWO)))


def test_parts_are_joined_and_rows_picked():
    whole = joined([{"a": ONE, "b": TWO}, {"a": ONE, "b": TWO}])
    assert {name: len(value) for name, value in whole.items()} == {"a": 8, "b": 8}
    assert rows({"a": torch.arange(4)}, [2, 0])["a"].tolist() == [2, 0]


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, index=None):
        assert index is None or not index.is_floating_point()
        return self.scale * x if index is None else self.scale * x[index]


def test_a_model_is_called_with_a_tensor_a_tuple_or_a_mapping():
    net, x, index = Adding(), torch.randn(4, 3), torch.tensor([2, 1])
    assert torch.equal(only(run(net, x)), x.double())
    for batch in ((x, index), {"x": x, "index": index}):
        assert torch.equal(only(run(net, batch)), x.double()[index])
    assert torch.equal(only(run(net, x, lambda y: -y)), -x.double())
