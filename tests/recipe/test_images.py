"""The images of a recipe: drawn under a seed, preprocessed as the weights want."""

import pytest
import timm
import torch
import torchvision
from PIL import Image
from small_recipe import SIDE, images, photos, written
from timm.data import create_transform, resolve_model_data_config

from cora_plugin import CoRaError
from cora_plugin.recipe.images import drawn, files, make, preprocessing, transform
from cora_plugin.recipe.schema import Recipe


def recipe(tmp_path, data, **more):
    return Recipe.read(written(tmp_path / "recipe.yaml", data=data, **more))


def draw(recipe):
    data = make(recipe, "data", files(recipe, "data"))
    test = None
    if recipe.test.folder or recipe.test.glob or recipe.test.factory:
        test = make(recipe, "test", files(recipe, "test"))
    return drawn(recipe, data, test)


def failure(tmp_path, data, **more):
    with pytest.raises(CoRaError) as error:
        draw(recipe(tmp_path, data, **more))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sample_is_drawn_under_a_seed(tmp_path):
    folder = photos(tmp_path / "photos", 30)
    source = {"folder": str(folder), "images": 10}
    data, test = draw(recipe(tmp_path, source, test={"images": 12}))
    assert len(data) == 10 and len(test) == 12
    assert not set(data.indices) & set(test.indices)
    assert sorted(data.indices) != list(range(10))  # Not the first ones.
    again = draw(recipe(tmp_path, source, test={"images": 12}))
    assert (again[0].indices, again[1].indices) == (data.indices, test.indices)
    other = draw(recipe(tmp_path, {**source, "seed": 1}))
    assert other[0].indices != data.indices
    # Without a number, all that is left is tested with.
    assert len(draw(recipe(tmp_path, source))[1]) == 20


def test_a_folder_has_labels_and_a_glob_has_none(tmp_path):
    folder = photos(tmp_path / "photos", 9)
    listed = files(recipe(tmp_path, {"folder": str(folder)}), "data")
    assert listed.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2] and listed.classes == 3
    listed = files(recipe(tmp_path, {"glob": f"{folder}/**/00*.png"}), "data")
    assert len(listed) == 9 and listed.labels is None


def test_classes_put_folders_in_the_order_of_the_outputs(tmp_path):
    folder = photos(tmp_path / "photos", 3)
    names = tmp_path / "classes.txt"
    names.write_text("class2\nother\nclass0\nclass1\n")
    source = {"folder": str(folder), "classes": str(names)}
    listed = files(recipe(tmp_path, source), "data")
    assert listed.labels == [2, 3, 0] and listed.classes == 4
    names.write_text("class2\nclass0\n")
    message = failure(tmp_path, source)
    assert ":5: data.classes:" in message and "has no class1" in message


def test_paths_may_hold_variables(tmp_path, monkeypatch):
    photos(tmp_path / "photos", 3)
    monkeypatch.setenv("PHOTOS", str(tmp_path))
    assert len(files(recipe(tmp_path, {"folder": "$PHOTOS/photos"}), "data")) == 3


def test_a_factory_makes_tensors_or_pictures(tmp_path):
    pair = recipe(tmp_path, {"factory": "small_recipe:images", "args": {"count": 7}})
    data = make(pair, "data", None)
    x, y = images(7)
    assert len(data) == 7 and torch.equal(data[3][0], x[3]) and data[3][1] == y[3]
    alone = recipe(tmp_path, {"factory": "small_recipe:unlabelled"})
    assert make(alone, "data", None)[0][1] == -1
    folder = photos(tmp_path / "photos", 2, side=SIDE)
    pictures = recipe(
        tmp_path,
        {"factory": "torchvision.datasets:ImageFolder", "args": {"root": str(folder)}},
    )
    data = make(pictures, "data", None)
    with pytest.raises(CoRaError, match=r"or give data\.preprocessing"):
        data[0]
    data.transform = torchvision.transforms.ToTensor()
    assert data[1][0].shape == (3, SIDE, SIDE) and data[1][1] == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"glob": "nowhere/*.png"}, ":4: data.glob: no file matches nowhere/*.png"),
        ({"folder": "nowhere"}, ":4: data.folder: nowhere is not a folder"),
        ({"folder": "."}, ":4: data.folder: . has no sub-folder with images"),
        ({"factory": "nowhere:data"}, ":4: data.factory: nowhere:data cannot be impor"),
        ({"factory": "small_recipe:net"}, "made a Net; it should make something with"),
        (
            {"factory": "small_recipe:images", "images": 65},
            "65 images are wanted and 64",
        ),
        ({"factory": "small_recipe:images", "images": 64}, "leaves none to test with"),
    ],
)
def test_images_that_cannot_be_had(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in failure(tmp_path, data)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "b.png").write_text("none either")
    source = recipe(tmp_path, {"glob": f"{tmp_path}/*.png", "images": 1})
    data, _ = draw(source)
    data.dataset.transform = torchvision.transforms.ToTensor()
    with pytest.raises(CoRaError, match=r"[ab]\.png: cannot be read as an image"):
        data[0]


@pytest.fixture(scope="module")
def picture():
    pixels = torch.rand(3, 11, 17, generator=torch.Generator().manual_seed(0))
    return torchvision.transforms.functional.to_pil_image(pixels).resize((340, 220))


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "resnet18", "tf_efficientnet_lite0", "test_vit3"]
)
def test_preprocessing_is_that_of_timm(name, picture, tmp_path):
    with torch.device("meta"):
        model = timm.create_model(name)
    source = recipe(tmp_path, {"glob": "*"}, model={"timm": name})
    ours = transform(source, preprocessing(source, model))
    theirs = create_transform(**resolve_model_data_config(model), is_training=False)
    assert torch.equal(ours(picture), theirs(picture))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b1"])
def test_preprocessing_is_that_of_torchvision(name, picture, tmp_path):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    source = recipe(tmp_path, {"glob": "*"}, model={"torchvision": name})
    ours = transform(source, preprocessing(source, model))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    torch.testing.assert_close(ours(picture), weights.transforms()(picture))


def test_preprocessing_that_is_given(tmp_path):
    given = {"size": 8, "resize": 10, "mean": [0, 0, 0], "std": [1, 1, 1]}
    given["interpolation"] = "nearest"
    source = recipe(tmp_path, {"glob": "*", "preprocessing": given})
    wanted = preprocessing(source, torch.nn.Identity())
    pixels = Image.new("RGB", (20, 10), (255, 0, 51))
    x = transform(source, wanted)(pixels)
    assert x.shape == (3, 8, 8)
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor([1.0, 0.0, 0.2]))


def test_another_size_keeps_the_border(tmp_path):
    with torch.device("meta"):
        model = torchvision.models.get_model("resnet18")
    source = recipe(
        tmp_path,
        {"glob": "*", "preprocessing": {"size": 112}},
        model={"torchvision": "resnet18"},
    )
    wanted = preprocessing(source, model)
    assert (wanted.size, wanted.resize) == (112, 128)
