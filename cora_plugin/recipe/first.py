"""A first recipe, from a few flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cora_plugin.adapters.errors import DataError, FileError
from cora_plugin.document import Document
from cora_plugin.recipe.folder import expanded

HEAD = """\
# Run it with: cora-plugin run {name}
# docs/recipes/README.md explains every key.
"""


def first_recipe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a recipe.

    Args:
        flags: `timm`, `torchvision` or `factory`, the model; `images`, a folder;
            `toolkit`; `weight_bits`, `act_bits`, `cora`, `formats` and `output`, which
            may be None.

    Raises:
        DataError: The folder of images is none, or has none.
    """
    models = ("timm", "torchvision", "factory")
    ptq = {n: flags[n] for n in ("weight_bits", "act_bits") if flags[n] is not None}
    recipe = {
        "model": {name: flags[name] for name in models if flags[name]},
        "data": _images(flags["images"], factory=bool(flags["factory"])),
        "toolkit": flags["toolkit"],
        "ptq": ptq,
        "cora": flags["cora"],
        "exports": flags["formats"],
        "output": flags["output"],
    }
    return {name: value for name, value in recipe.items() if value not in (None, {})}


def _images(folder: str, factory: bool) -> dict[str, Any]:
    """The data section: with labels where each class has a sub-folder."""
    root = expanded(folder)
    if not root.is_dir():
        raise DataError(f"--images {folder}: is not a folder")
    try:
        entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        problem = f"--images {folder}: cannot be read: {error.strerror}"
        raise DataError(problem) from error
    if any(entry.is_file() for entry in entries):
        found: dict[str, Any] = {"glob": f"{folder.rstrip('/')}/*.*"}
    elif entries:
        # Whether the folders are in the order of the model's outputs is not known.
        found = {"glob": f"{folder.rstrip('/')}/**/*.*"}
    else:
        raise DataError(f"--images {folder}: there is nothing in it")
    if factory:  # Others say themselves how images are made their input.
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        found["preprocessing"] = {"size": 224, "resize": 256, "mean": mean, "std": std}
    return found


def document(recipe: dict[str, Any]) -> Document:
    """The recipe as if it had been read from a file."""
    return Document("", recipe)


def write_first(path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe with a line on how to run it.

    Raises:
        FileError: There is a file already, or there can be none.
    """
    text = HEAD.format(name=path) + yaml.safe_dump(
        dict(recipe), sort_keys=False, allow_unicode=True, default_flow_style=None
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise FileError(f"{path}: is there already; name another file") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from error
