"""Both hosts look at models and data before they work, and say the same of them."""

import pytest
import torch
from interrupted_net import HOSTS, data, net
from small_recipe import Untraceable
from untouched import untouched

from cora_plugin import CoRaError, DataError, ToolkitError
from cora_plugin.adapters.errors import ConfigError, ModelError
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
    "no image": (
        [torch.zeros(0, 3, 8, 8)],
        "item 0 is a tensor of shape [0, 3, 8, 8] and torch.float32, without a single",
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


NO_MODELS = {
    "nothing": (None, "the model is a NoneType; pass a torch.nn.Module"),
    "a name": ("resnet18", "the model is a str; pass a torch.nn.Module"),
    "a class": (Untraceable, "the model is the class Untraceable; call it to make one"),
}


@pytest.mark.parametrize("case", NO_MODELS)
@pytest.mark.parametrize("host", HOSTS)
def test_what_is_no_model_is_told(host, case):
    model, expected = NO_MODELS[case]
    with pytest.raises(ModelError) as error:
        host.quantized(model, data())
    assert str(error.value).startswith(expected)


OUT_OF_BOUNDS = {
    "weight_bits": (99, 1, -1, True, 4.5, "4", None),
    "act_bits": (0, 16),
    "depthwise_bits": (77,),
    "first_last_bits": (1,),
    "layer_bits": ({"*": 99}, {"*": "4"}, 5),
    "act_range": ("best",),
}


@pytest.mark.parametrize("option", OUT_OF_BOUNDS)
def test_options_have_the_bounds_of_recipes_on_both(option):
    """One declaration serves keyword arguments and files."""
    for value in OUT_OF_BOUNDS[option]:
        said = []
        for host in HOSTS:
            model = net()
            with untouched(model), pytest.raises(ConfigError) as error:
                host.functions.quantize_ptq(model, data(), **{option: value})
            said.append(str(error.value))
            assert said[-1].startswith(option)
        assert said[0] == said[1] or option in ("act_range", "first_last_bits")


@pytest.mark.parametrize("host", HOSTS)
def test_images_of_another_float_type_are_cast_to_the_models(host):
    batches = [images.double() for images in data()]
    same, other = (host.quantized(net(), each) for each in (data(), batches))
    report = host.apply(other, batches, {"budget": 0.5})
    host.apply(same, data(), {"budget": 0.5})
    outputs = [model(data()[0]) for model in (same, other)]
    assert torch.equal(*(getattr(y, "value", y) for y in outputs))
    assert report.layers


@pytest.mark.parametrize("host", HOSTS)
def test_a_loader_that_fails_is_no_failure_of_the_toolkit(host):
    class Failing:
        def __iter__(self):
            yield data()[0]
            raise RuntimeError("the disk is gone\nreally")

    with pytest.raises(DataError) as error:
        host.quantized(net(), Failing())
    expected = "calibration data: item 1 cannot be made: RuntimeError: the disk is gone"
    assert str(error.value) == expected
    assert isinstance(error.value.__cause__, RuntimeError)


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
