"""A recipe says which key is wrong, on which line, and what is right."""

import pytest
import yaml
from small_recipe import written

from cora_plugin import CoRaError
from cora_plugin.recipe.schema import Recipe

MINIMAL = """\
model: {factory: small_recipe:net}
data: {factory: small_recipe:images}
toolkit: brevitas
"""


def read(tmp_path, text, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return Recipe.read(path, overrides)


def test_what_is_left_out_has_defaults(tmp_path):
    recipe = read(tmp_path, MINIMAL)
    assert recipe.cora.budget.amount == 0.05
    assert recipe.data.batch_size == 16 and recipe.data.seed == 0
    assert recipe.exports == () and recipe.ptq == {}


def test_a_recipe_written_again_is_the_same(tmp_path):
    exports = [
        "adapters",
        {"format": "onnx_qcdq", "path": "m.onnx", "opset_version": 18},
    ]
    recipe = Recipe.read(written(tmp_path / "a.yaml", exports=exports))
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.read(again) == recipe


@pytest.mark.parametrize("value", ["false", "null"])
def test_adapters_may_be_left_out(value, tmp_path):
    assert read(tmp_path, MINIMAL + f"cora: {value}").cora is None


@pytest.mark.parametrize(
    ("text", "budget"), [("5%", 0.05), ("0.1", 0.1), ("'budget=0.2,seed=1'", 0.2)]
)
def test_settings_may_be_short(text, budget, tmp_path):
    assert read(tmp_path, MINIMAL + f"cora: {text}").cora.budget.amount == budget


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("modle: 1", ":4: unknown key 'modle'; did you mean model?"),
        ("test: {image: 3}", ":4: test: unknown key 'image'; did you mean images?"),
        ("test:\n  images: many", ":5: test.images: 'many' is not a whole number or n"),
        ("test: {images: 0}", ":4: test.images: 0 is out of range; use 1"),
        ("test: {args: {a: 1}}", ":4: test.args: they are for a factory"),
        ("test: {folder: a, glob: b}", ":4: test: folder and glob exclude each other"),
        ("test: {glob: a, classes: b}", ":4: test.classes: they name sub-folders"),
        ("cora:\n  budgte: 1", ":5: cora: unknown key 'budgte'; did you mean budget?"),
        ("cora:\n  seed: 1\n  budget: 0", ":6: cora.budget: 0.0 is not a positive"),
        ("cora:\n  butterworth:\n    lr: 0", ":6: cora.butterworth.lr: 0 is out of"),
        ("cora:\n  damping: no", ":5: cora.damping: False is not a number"),
        ("cora:\n  fit: 3\n  refine: 3", ":5: cora.fit: now called refine, which is"),
        ("cora:\n  ranks:\n    a.b: x", ":6: cora.ranks.a.b: 'x' is not a whole numb"),
        ("cora: 'seed=1,sed=2'", ":4: cora: sed=2: unknown key 'sed'; did you mean s"),
        ("cora: none.yaml", ":4: cora: none.yaml: cannot be read"),
        ("ptq: 4", ":4: ptq: 4 is not a mapping"),
        ("exports: adapters", ":4: exports: 'adapters' is not a list"),
        ("exports:\n  - {path: a}", ":5: exports.0: no format; name one"),
        ("exports:\n  - {format: a, path: ../b}", ":5: exports.0.path: '../b' leaves"),
        ("exports:\n  - {format: a, path: /b}", ":5: exports.0.path: '/b' leaves"),
        ("output: 3", ":4: output: 3 is not text"),
    ],
)
def test_wrong_keys_and_values(more, message, tmp_path):
    with pytest.raises(CoRaError) as error:
        read(tmp_path, MINIMAL + more)
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}{message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("toolkit=tensorrt", "toolkit: 'tensorrt' is unknown; use brevitas or nncf"),
        ("data.batch_size=0", "data.batch_size: 0 is out of range; use 1 or more"),
        ("data.seed=a", "data.seed: 'a' is not a whole number"),
        ("data.preprocessing.size=0", "data.preprocessing.size: 0 is out of range"),
        ("data.preprocessing.size=[1, 0]", "data.preprocessing.size.1: 0 is out of r"),
        ("data.preprocessing.size=[1]", "data.preprocessing.size: [1]; pass a number"),
        ("data.preprocessing.mean=x", "data.preprocessing.mean: 'x' is not a list"),
        ("data.preprocessing=x", "data.preprocessing: 'x' is not a mapping"),
        ("model.pretrained=true", "model.pretrained: a factory's weights are its own"),
        ("model=resnet18", "model: 'resnet18' is not a mapping of names"),
    ],
)
def test_wrong_overrides(override, message, tmp_path):
    with pytest.raises(CoRaError) as error:
        read(tmp_path, MINIMAL, override)
    assert str(error.value).startswith(f"--set {override}: {message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.factory=null", ":2: data: no source; give one of folder, glob, factory"),
        ("model.timm=resnet18", ":1: model: timm and factory exclude each other"),
    ],
)
def test_one_source_is_needed(override, message, tmp_path):
    with pytest.raises(CoRaError) as error:
        read(tmp_path, MINIMAL, override)
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}{message}")
