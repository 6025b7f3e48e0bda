"""Both hosts look at models and data before they work, and say the same of them."""

import pytest
import torch
from interrupted_net import HOSTS, data, net
from small_recipe import Untraceable
from untouched import untouched

from cora_plugin import CoRaError, DataError, ToolkitError
from cora_plugin.integrations.data import CalibrationData

WRONG = {
    "one tensor": (torch.zeros(8, 3, 8, 8), "is one tensor, [8, 3, 8, 8], and not"),
    "nothing": ([], "the loader is empty"),
    "no loader": (7, "a int is no loader"),
    "a path": ("photos", "a str is no loader"),
    "a mapping": ({"x": torch.zeros(8, 3, 8, 8)}, "a dict is no loader"),
    "channels": ([torch.zeros(8, 1, 8, 8)], "the model does not run with item 0"),
    "bytes": (
        [torch.zeros(8, 3, 8, 8, dtype=torch.uint8)],
        "does not run with item 0, a tensor of shape [8, 3, 8, 8] and torch.uint8",
    ),
    "nan": ([torch.full((8, 3, 8, 8), float("nan"))], "item 0 holds NaN"),
    "no images": ([("a.png", 3)], "item 0 is a tuple of (str, int)"),
}


def said(work, *args):
    with pytest.raises(DataError) as error:
        work(*args)
    return str(error.value)


@pytest.mark.parametrize("case", WRONG)
def test_both_say_the_same_of_data(case):
    loader, expected = WRONG[case]
    found = []
    for host in HOSTS:
        model = net()
        with untouched(model):
            found.append(said(host.quantized, model, loader))
    assert found[0] == found[1]
    assert expected in found[0]
    # And so does the step behind it, of a quantized model.
    for host in HOSTS:
        model = host.quantized(net(), data())
        with untouched(model):
            later = said(host.apply, model, loader)
        # (In a quantized model it is a quantizer that refuses bytes.)
        if case not in ("nothing", "bytes"):
            assert later == found[0]


@pytest.mark.parametrize("host", HOSTS)
def test_swapped_arguments_are_told(host):
    model = host.quantized(net(), data())
    swap = "is a Net, a model; model and data are in each other's place"
    assert swap in said(host.quantized, data(), net())
    assert "model and data are in each other's place" in said(host.apply, data(), model)


@pytest.mark.parametrize("host", HOSTS)
def test_an_iterator_is_refused_before_it_is_walked(host):
    batches = iter(data())
    assert "an iterator can be walked once" in said(host.quantized, net(), batches)
    assert len(list(batches)) == 3


@pytest.mark.parametrize("host", HOSTS)
def test_a_toolkits_error_says_what_was_done_and_stands_behind(host):
    model = Untraceable()
    with untouched(model), pytest.raises(CoRaError) as error:
        host.quantized(model, data())
    assert isinstance(error.value, ToolkitError)
    title = {"brevitas": "Brevitas", "nncf": "NNCF"}[host.__name__]
    assert str(error.value).startswith(f"{title} failed at ")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


def test_data_is_walked_as_often_as_wanted_and_read_alike():
    pairs = [(images, torch.zeros(8)) for images in data()]
    read = CalibrationData(net(), pairs)
    for _ in range(2):
        for batch, images in zip(read, data(), strict=True):
            assert torch.equal(batch, images)
    assert torch.equal(read.first, data()[0])
    pairs[2] = (pairs[2][0] * float("inf"), pairs[2][1])
    with pytest.raises(DataError, match="item 2 holds"):
        list(CalibrationData(net(), pairs))
