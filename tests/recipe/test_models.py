"""The float model of a recipe: by name, by factory, with a checkpoint's weights."""

import pickle

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from small_recipe import net, written
from torch import nn

from cora_plugin import CoRaError
from cora_plugin.recipe.models import (
    check_model,
    load_model,
    own_modules,
    package,
    plain_layers,
)
from cora_plugin.recipe.schema import Recipe


def recipe(tmp_path, **model):
    return Recipe.read(written(tmp_path / "recipe.yaml", model=model))


def failure(tmp_path, **model):
    wrong = recipe(tmp_path, **model)
    with pytest.raises(CoRaError) as error:
        check_model(wrong)
        load_model(wrong)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same(model, other):
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())  # To be trained on.
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_factory(tmp_path):
    wanted = recipe(tmp_path, factory="small_recipe:net", args={"channels": 8})
    check_model(wanted)
    assert_same(load_model(wanted), net(8))


def test_a_factory_in_the_working_folder(tmp_path, monkeypatch):
    module = "from torch import nn\ndef build():\n    return nn.Linear(2, 3)\n"
    (tmp_path / "my_own_net.py").write_text(module)
    wanted = recipe(tmp_path, factory="my_own_net:build")
    monkeypatch.chdir(tmp_path)
    with own_modules():
        assert isinstance(load_model(wanted), nn.Linear)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint(suffix, wrapped, tmp_path):
    trained = net()
    state = trained.state_dict()
    if wrapped:
        state = {f"module.{name}": value for name, value in state.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": state, "epoch": 3} if wrapped else state, path)
    else:
        save_file(state, path)
    model = recipe(tmp_path, factory="small_recipe:Net", checkpoint=str(path))
    check_model(model)
    assert_same(load_model(model), trained)


def test_a_timm_name_with_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model("test_efficientnet", num_classes=7)
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    model = load_model(
        recipe(
            tmp_path,
            timm="test_efficientnet",
            checkpoint=str(path),
            args={"num_classes": 7},
        )
    )
    assert_same(model, trained)
    x = torch.randn(2, 3, 64, 64)
    plain = plain_layers(model, x)
    assert not any(
        "timm.layers.norm_act" in type(m).__module__ for m in plain.modules()
    )
    torch.testing.assert_close(plain(x), model(x))


def test_a_torchvision_name(tmp_path):
    wanted = recipe(tmp_path, torchvision="squeezenet1_1", pretrained=False)
    check_model(wanted)
    assert isinstance(load_model(wanted), torchvision.models.SqueezeNet)


def test_unpickling_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps({"a": net}))
    message = failure(tmp_path, factory="small_recipe:Net", checkpoint=str(path))
    assert ":4: model.checkpoint:" not in message  # The line is the key's own.
    assert ":3: model.checkpoint:" in message and "nothing else is unpickled" in message


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"head.weight": torch.zeros(3, 32)}, "no layers.0.weight, which the model"),
        ({**net().state_dict(), "x": torch.zeros(1)}, "x is not in the model"),
        ({**net().state_dict(), "head.bias": torch.zeros(4)}, "head.bias is [4], the"),
        ([torch.zeros(1)], "holds a list, no state dict"),
    ],
)
def test_weights_that_do_not_fit(state, message, tmp_path):
    torch.save(state, tmp_path / "weights.pt")
    path = str(tmp_path / "weights.pt")
    assert message in failure(tmp_path, factory="small_recipe:Net", checkpoint=path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"timm": "resnet19"},
            ":2: model.timm: unknown model 'resnet19'; did you mean ",
        ),
        (
            {"torchvision": "resnet19"},
            ":2: model.torchvision: unknown model 'resnet19'",
        ),
        ({"factory": "small_recipe"}, "name it as package.module:function"),
        ({"factory": "./small_recipe.py:net"}, "name it as package.module:function"),
        ({"factory": ".small_recipe:net"}, "name it as package.module:function"),
        ({"factory": "sys:exit"}, "sys:exit failed: SystemExit: "),
        ({"factory": "no_such:net"}, "No module named 'no_such'"),
        ({"factory": "small_recipe:no"}, "has no attribute 'no'"),
        ({"factory": "small_recipe:SIDE"}, "small_recipe:SIDE is not callable"),
        ({"factory": "small_recipe:images"}, "made a tuple, no module"),
        ({"timm": "test_resnet", "args": {"depht": 3}}, "test_resnet cannot be made: "),
        (
            {"timm": "test_resnet", "checkpoint": "no.pt"},
            ":3: model.checkpoint: no file",
        ),
    ],
)
def test_models_that_cannot_be_had(model, message, tmp_path):
    if "timm" in model:
        model = {"pretrained": False, **model}
        message = message.replace(":2:", ":3:").replace(":3: model.ch", ":4: model.ch")
    assert message in failure(tmp_path, **model)


def test_an_absent_package_is_named_with_the_way_out(tmp_path):
    document = recipe(tmp_path, timm="resnet18").document
    with pytest.raises(ModuleNotFoundError) as error:
        package(document, ("model", "timm"), "no_such_package")
    message = (
        "recipe.yaml:2: model.timm needs the package no_such_package, which is not"
    )
    assert message in str(error.value)
    assert 'pip install "cora-plugin[cli]"' in str(error.value)
