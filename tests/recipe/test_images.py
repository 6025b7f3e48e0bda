"""The images of a recipe: drawn under a seed, preprocessed as the weights want."""

import struct
import zlib

import pytest
import timm
import torch
import torchvision
from PIL import Image
from small_recipe import SIDE, images, photos, written
from timm.data import create_transform, resolve_model_data_config

from cora_plugin import CoRaError
from cora_plugin.adapters.errors import DataError
from cora_plugin.recipe.images import (
    Files,
    drawn,
    files,
    make,
    preprocessing,
    rgb,
    transform,
)
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


@pytest.mark.parametrize(
    ("count", "test", "expected"),
    [(60, {}, (48, 12)), (60, {"images": 50}, (10, 50)), (2, {}, (1, 1))],
)
def test_a_small_folder_is_split_where_no_numbers_are_given(
    count, test, expected, tmp_path
):
    folder = photos(tmp_path / "photos", count)
    given = recipe(tmp_path, {"folder": str(folder)}, test=test)
    assert tuple(map(len, draw(given))) == expected


def test_one_image_cannot_calibrate_and_test(tmp_path):
    folder = photos(tmp_path / "photos", 1)
    assert "leaves none to test with" in failure(tmp_path, {"folder": str(folder)})


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
        ({"folder": "."}, "images without labels go by glob, as ./*.jpg"),
        ({"glob": "*.*"}, "no file matches *.*, with an image's ending"),
        ({"folder": ".", "classes": "a\0b"}, "data.classes: 'a\\x00b' holds a NUL"),
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


def test_a_glob_that_leaves_the_ending_open_takes_images_alone(tmp_path):
    for folder in ("plain", "b[1]"):
        photos(tmp_path / folder, 3, classes=1)
        (tmp_path / folder / "class0" / "notes.txt").write_text("of the user")
        for ending in ("*.*", "*", "*.png"):
            pattern = f"{tmp_path}/{folder}/*/{ending}"
            found = files(recipe(tmp_path, {"glob": pattern}), "data")
            assert [path[-7:] for path in found.paths] == [
                "000.png",
                "001.png",
                "002.png",
            ]
    named = f"{tmp_path}/plain/class0/*.txt"
    assert len(files(recipe(tmp_path, {"glob": named}), "data")) == 1


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


def picture_of(path, mode):
    """A picture of a mode that is white on the left and black on the right."""
    gray = Image.new("L", (8, 8))
    gray.paste(255, (0, 0, 4, 8))
    gray.convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
def test_pictures_of_eight_bits_look_alike(mode, tmp_path):
    with Image.open(picture_of(tmp_path / "a.png", mode)) as image:
        pixels = rgb(image, "a.png")
    assert pixels.mode == "RGB"
    assert pixels.getpixel((1, 1)) == (255,) * 3
    assert pixels.getpixel((6, 1)) == (0,) * 3


def test_a_rotated_picture_is_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste((255, 0, 0), (0, 0, 2, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # To be turned by a quarter.
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        turned = rgb(opened, "a.png")
    assert turned.size == (4, 8) and turned.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("16", "is a picture of mode I;16, of more than 8 bits"),
        ("float", "is a picture of mode F, of more than 8 bits"),
        ("alpha", "has transparent parts"),
        ("palette", "has transparent parts"),
        ("animated", "has 2 frames"),
        ("bomb", "cannot be read as an image: Image size"),
    ],
)
def test_a_picture_that_would_be_changed_is_refused_by_name(kind, message, tmp_path):
    path = tmp_path / "a.png"
    gray = Image.linear_gradient("L")
    if kind == "16":
        gray.convert("I").convert("I;16").save(path)
    elif kind == "float":
        path = tmp_path / "a.tiff"
        gray.convert("F").save(path)
    elif kind == "alpha":
        Image.merge("LA", (gray, gray)).save(path)
    elif kind == "palette":
        gray.convert("P").save(path, transparency=0)
    elif kind == "animated":
        path = tmp_path / "a.gif"
        gray.save(path, save_all=True, append_images=[gray.rotate(90)])
    else:
        header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts))
    listed = Files([str(path)], None, None)
    with pytest.raises(DataError) as error:
        listed[0]
    assert str(error.value).startswith(f"{path}: {message}")


def chunk(kind, content):
    """A chunk of a PNG file."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def test_hidden_folders_are_no_classes(tmp_path):
    folder = photos(tmp_path / "photos", 3)
    hidden = folder / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "a.png").write_bytes((folder / "class0" / "000.png").read_bytes())
    (folder / "class0" / "._000.png").write_text("of another system")
    listed = files(recipe(tmp_path, {"folder": str(folder)}), "data")
    assert listed.classes == 3 and len(listed) == 3


def test_classes_may_have_blanks_in_their_names(tmp_path):
    folder = photos(tmp_path / "photos", 3)
    (folder / "class0").rename(folder / "great white shark")
    names = tmp_path / "classes.txt"
    names.write_text("class2\n\ngreat white shark\nclass1\n")
    source = {"folder": str(folder), "classes": str(names)}
    assert files(recipe(tmp_path, source), "data").labels == [2, 0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"mean": [123.7, 116.3, 103.5]},
            "preprocessing.mean.0: 123.7 is out of range",
        ),
        ({"std": [58.4, 57.1, 57.4]}, "preprocessing.std.0: 58.4 is out of range"),
        ({"std": [0, 1, 1]}, "preprocessing.std.0: 0 is out of range"),
        ({"mean": [0.5]}, "preprocessing.mean: [0.5]; pass a list of three"),
        ({"size": 0}, "preprocessing.size: 0 is out of range"),
    ],
)
def test_values_nobody_means_are_refused(given, message, tmp_path):
    with pytest.raises(CoRaError) as error:
        recipe(tmp_path, {"glob": "*", "preprocessing": given})
    assert message in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_have_bounds(seed, tmp_path):
    with pytest.raises(CoRaError, match=r"data\.seed: .* is out of range"):
        recipe(tmp_path, {"glob": "*", "seed": seed})


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("small_recipe:images", "failed: TypeError: images() got an unexpected"),
        ("..small:images", "'..small:images'; name it as package.module:function"),
        ("math:floor", "failed: TypeError"),
    ],
)
def test_a_factory_that_fails_is_one_line(factory, message, tmp_path):
    source = {"factory": factory, "args": {"wrong": 1}}
    assert message in failure(tmp_path, source)
