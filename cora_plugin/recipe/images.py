"""The images of a recipe: where they are, which are drawn, how they are processed."""

import glob
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from cora_plugin.adapters.errors import DataError, FileError, Key, dotted
from cora_plugin.document import Document
from cora_plugin.integrations.doing import in_a_line
from cora_plugin.recipe.folder import expanded
from cora_plugin.recipe.models import called, imported, package
from cora_plugin.recipe.schema import ImageSection, Preprocessing, Recipe

CALIBRATION, TEST = 256, 500
"""How many images are drawn if a recipe does not say, at most."""

TESTING = 5
"""One of so many images tests, at least, where calibration and test share a source."""

NO_LABEL = -1
"""The class of an image that has none."""

Item = tuple[Tensor, int]
Transform = Callable[[Any], Tensor]


class Files:
    """Image files, each a picture and its class, -1 for none.

    Args:
        paths: The files.
        labels: The class of each, or None.
        count: The number of classes, or None.
    """

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int] | None, count: int | None
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.classes = count

    def __len__(self) -> int:
        """The number of files."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """A PIL image and its class."""
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels = rgb(image, path)
        except DataError:
            raise
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise DataError(f"{path}: cannot be read as an image: {why}") from error
        label = NO_LABEL if self.labels is None else self.labels[index]
        return pixels, label


def rgb(image: Any, name: str) -> Any:
    """A picture in red, green and blue, 8 bits each, upright as EXIF says.

    Raises:
        DataError: It cannot be made so without being changed: it has more bits, more
            frames, or transparent parts.
    """
    from PIL import ImageOps

    if image.mode == "F" or image.mode.startswith("I"):
        raise DataError(
            f"{name}: is a picture of mode {image.mode}, of more than 8 bits a pixel; "
            "scale it to 8 bits, or make tensors by a factory"
        )
    # Of a photo for two eyes, MPO, the first is the picture.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise DataError(f"{name}: has {image.n_frames} frames; save the one you mean")
    if (
        "A" in image.getbands()
        or "a" in image.getbands()
        or "transparency" in image.info
    ):
        image = image.convert("RGBA")
        lowest, _ = image.getchannel("A").getextrema()
        if lowest < 255:
            raise DataError(
                f"{name}: has transparent parts; put it on a background and save it "
                "without"
            )
    return ImageOps.exif_transpose(image).convert("RGB")


class Images(Dataset[Item]):
    """Model inputs and their classes; PIL images are preprocessed by `transform`.

    Args:
        source: `Files`, or what a factory made: `(image, label)` or images.
        name: The recipe's key that it comes from.
    """

    def __init__(self, source: Any, name: str) -> None:
        self.classes: int | None = source.classes if isinstance(source, Files) else None
        self.transform: Transform | None = None
        self._name = name
        if isinstance(source, DataLoader):
            source = source.dataset
        if isinstance(source, tuple) and all(isinstance(t, Tensor) for t in source):
            source = TensorDataset(*source)
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise DataError(
                f"{name} made a {type(source).__name__}; it should make something "
                "with a length and an index, such as a Dataset, a tensor of images or "
                "a pair (images, labels)"
            )
        self._source = source

    def __len__(self) -> int:
        """The number of images."""
        return len(self._source)

    def __getitem__(self, index: int) -> Item:
        """An image [C, H, W] and its class."""
        try:
            item = self._source[index]
        except DataError:
            raise
        # Whatever a data set of somebody's own may raise.
        except Exception as error:
            problem = f"{self._name}: item {index} cannot be made: {in_a_line(error)}"
            raise DataError(problem) from error
        pair = isinstance(item, list | tuple)
        image = item[0] if pair else item
        label = self._label(index, item[1]) if pair and len(item) > 1 else NO_LABEL
        if not isinstance(image, Tensor):
            if self.transform is None:
                raise DataError(
                    f"{self._name}: item {index} is a {type(image).__name__}; make "
                    "tensors, or give data.preprocessing"
                )
            image = self.transform(rgb(image, f"{self._name}: item {index}"))
        return image, label

    def _label(self, index: int, value: Any) -> int:
        """A class that is one whole number.

        Raises:
            DataError: It is something else.
        """
        try:
            label = int(value)
            if label == value:
                return label
        except (RuntimeError, TypeError, ValueError):
            pass
        kind = type(value).__name__
        if isinstance(value, Tensor):
            kind = f"tensor {list(value.shape)} of {value.dtype}"
        raise DataError(
            f"{self._name}: item {index} has a {kind} for a label; make it the number "
            "of the class, or leave labels out"
        )

    def name_of(self, index: int) -> str:
        """What errors call an image: its file, or its place."""
        if isinstance(self._source, Files):
            return self._source.paths[index]
        return f"{self._name}: item {index}"


def files(recipe: Recipe, name: str) -> Files | None:
    """List the files of a section (`data` or `test`); None where a factory makes them.

    Raises:
        DataError: There are none, or a sub-folder is no known class.
        ModuleNotFoundError: A package that reads images is not installed.
    """
    document = recipe.document
    section: ImageSection = getattr(recipe, name)
    source, where = section.source
    key: Key = (name, source)
    if source == "factory":
        imported(document, key, where)
        return None
    package(document, key, "PIL")
    package(document, key, "torchvision")
    if source == "folder":
        return _image_folder(document, name, where, section.classes)
    found = _matching(str(expanded(where)))
    if not found:
        kind = ", with an image's ending" if _leaves_ending(where) else ""
        raise document.error(key, f"no file matches {where}{kind}", DataError)
    return Files(found, None, None)


def _matching(pattern: str) -> list[str]:
    """The files that a glob matches; of images alone where it leaves the ending open.

    Brackets that match nothing as a set of characters are those of a name.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    literal = pattern.replace("[", "[[]")
    for each in dict.fromkeys((pattern, literal)):
        found = sorted(filter(os.path.isfile, glob.glob(each, recursive=True)))
        if _leaves_ending(pattern):
            found = [name for name in found if name.lower().endswith(IMG_EXTENSIONS)]
        if found:
            return found
    return []


def _leaves_ending(pattern: str) -> bool:
    return pattern.endswith("*")


def make(recipe: Recipe, name: str, listed: Files | None) -> Images:
    """The images of a section; a factory is called now."""
    section: ImageSection = getattr(recipe, name)
    source, where = section.source
    key: Key = (name, source)
    images: Any = listed
    if images is None:
        images = called(recipe.document, key, where, section.args, DataError)
    return Images(images, f"{dotted(key)}: {where}")


def drawn(
    recipe: Recipe, data: Images, test: Images | None
) -> tuple[Subset[Item], Subset[Item]]:
    """Draw calibration and test images under the seed; none is in both.

    Args:
        recipe: Says how many, and the seed.
        data: Where calibration images are drawn from.
        test: Where test images are drawn from; None: from what is left of `data`.

    Raises:
        DataError: There are not enough.
    """
    order = _shuffled(len(data), recipe.data.seed)
    most = CALIBRATION
    if test is None:
        kept = recipe.test.images or -(-len(order) // TESTING)
        most = max(min(most, len(order) - kept), 1)
    calibrate = _count(recipe, "data", len(order), most)
    if test is None:
        rest = order[calibrate:]
        if not rest:
            raise recipe.document.error(
                ("data", "images"),
                f"{calibrate} of {len(order)} images calibrate, which leaves none to "
                "test with; set data.images to fewer or add a test section",
                DataError,
            )
        judged = Subset(data, rest[: _count(recipe, "test", len(rest), TEST)])
    else:
        chosen = _shuffled(len(test), recipe.data.seed)
        judged = Subset(test, chosen[: _count(recipe, "test", len(test), TEST)])
    return Subset(data, order[:calibrate]), judged


def _count(recipe: Recipe, name: str, available: int, default: int) -> int:
    wanted: int | None = getattr(recipe, name).images
    if wanted is None:
        return min(default, available)
    if wanted > available:
        raise recipe.document.error(
            (name, "images"),
            f"{wanted} images are wanted and {available} are there; set it to at most "
            f"{available}",
            DataError,
        )
    return wanted


def _shuffled(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _image_folder(
    document: Document, name: str, folder: str, classes: str | None
) -> Files:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    key: Key = (name, "folder")
    root = expanded(folder)
    if not root.is_dir():
        raise document.error(key, f"{folder} is not a folder", DataError)
    # Hidden ones are other programs', such as .ipynb_checkpoints.
    folders = sorted(
        entry
        for entry in root.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
    names = [entry.name for entry in folders]
    if classes is not None:
        listed = _lines(document, name, classes)
        unknown = next((each for each in names if each not in listed), None)
        if unknown is not None:
            problem = f"{classes} has no {unknown}, as {folder} has"
            raise document.error((name, "classes"), problem, DataError)
        names = listed
    found = [
        (str(path), names.index(entry.name))
        for entry in folders
        for path in sorted(entry.rglob("*"))
        if path.suffix.lower() in IMG_EXTENSIONS
        and not any(part.startswith(".") for part in path.relative_to(entry).parts)
    ]
    if not found:
        problem = (
            f"{folder} has no sub-folder with images in it, one a class; images "
            f"without labels go by glob, as {folder}/*.jpg"
        )
        raise document.error(key, problem, DataError)
    return Files([path for path, _ in found], [label for _, label in found], len(names))


def _lines(document: Document, name: str, path: str) -> list[str]:
    try:
        text = expanded(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{path} cannot be read"
        raise document.error((name, "classes"), problem, FileError) from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line]


def preprocessing(recipe: Recipe, model: nn.Module) -> Preprocessing:
    """What the recipe says, and where it is silent what the model's weights say."""
    given = recipe.data.preprocessing
    known = _of_weights(recipe, model)
    values = {name: value for name, value in vars(given).items() if value is not None}
    if "size" in values and "resize" not in values and isinstance(known.resize, int):
        # The same border is cut off at another size.
        if isinstance(values["size"], int) and isinstance(known.size, int):
            values["resize"] = round(values["size"] * known.resize / known.size)
    return replace(known, **values)


def transform(recipe: Recipe, wanted: Preprocessing) -> Transform | None:
    """The preprocessing of one PIL image; None where too little is known of it."""
    size, mean, std = wanted.size, wanted.mean, wanted.std
    if size is None or mean is None or std is None:
        return None
    package(recipe.document, ("data", "preprocessing"), "torchvision")
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        InterpolationMode,
        Normalize,
        Resize,
        ToTensor,
    )

    steps = Compose(
        [
            Resize(
                size if wanted.resize is None else wanted.resize,
                InterpolationMode(wanted.interpolation or "bilinear"),
                antialias=True,
            ),
            CenterCrop(size),
            ToTensor(),
            Normalize(mean, std),
        ]
    )
    result: Transform = steps
    return result


def _of_weights(recipe: Recipe, model: nn.Module) -> Preprocessing:
    if hasattr(model, "pretrained_cfg"):
        return _of_timm(recipe.document, model)
    if recipe.model.torchvision is None:
        return Preprocessing()
    from torchvision.models import get_model_weights

    preset = get_model_weights(recipe.model.torchvision)["DEFAULT"].transforms()
    return Preprocessing(
        size=preset.crop_size[0],
        resize=preset.resize_size[0],
        mean=list(preset.mean),
        std=list(preset.std),
        interpolation=preset.interpolation.value,
    )


def _of_timm(document: Document, model: Any) -> Preprocessing:
    config = package(document, ("model",), "timm.data").resolve_model_data_config(model)
    height, width = config["input_size"][1:]
    share = config["crop_pct"]
    resize: int | list[int]
    if config.get("crop_mode", "center") == "center" and height == width:
        resize = math.floor(height / share)
    else:
        resize = [math.floor(height / share), math.floor(width / share)]
    return Preprocessing(
        size=height if height == width else [height, width],
        resize=resize,
        mean=list(config["mean"]),
        std=list(config["std"]),
        interpolation=config["interpolation"],
    )
