"""What a recipe can say; `docs/recipes/README.md` explains every key."""

import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.config import CoRaConfig
from cora_plugin.document import Document, Key

TOOLKITS = ("brevitas", "nncf")
MODELS = ("timm", "torchvision", "factory")
IMAGES = ("folder", "glob", "factory")

Section = TypeVar("Section")


@dataclass(frozen=True)
class ModelSection:
    """Where the float model comes from: one of the first three."""

    timm: str | None = None
    torchvision: str | None = None
    factory: str | None = None
    pretrained: bool | None = None
    checkpoint: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a model's input; null: as the model's weights want it.

    `size` is the side that is cropped and `resize` the short side before that, in
    pixels, or each a list of height and width.
    """

    size: int | list[int] | None = None
    resize: int | list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    interpolation: (
        typing.Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]
        | None
    ) = None


@dataclass(frozen=True)
class ImageSection:
    """Where images come from, one of the first three, and how many are drawn."""

    folder: str | None = None
    glob: str | None = None
    factory: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    classes: str | None = None
    images: int | None = None

    @property
    def source(self) -> tuple[str, str]:
        """The one of the first three that is given, and its value; else two blanks."""
        given = ((name, getattr(self, name)) for name in IMAGES)
        return next(((name, value) for name, value in given if value), ("", ""))


@dataclass(frozen=True)
class DataSection(ImageSection):
    """The calibration images, and what test images share with them."""

    batch_size: int = 16
    seed: int = 0
    preprocessing: Preprocessing = Preprocessing()


@dataclass(frozen=True)
class Export:
    """A file to write: a format of the toolkit, its options, and a name."""

    format: str
    path: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A recipe whose keys and values are of the right kind; `check` looks further.

    `document` is the file that it was read from; errors say its lines.
    """

    model: ModelSection
    data: DataSection
    test: ImageSection
    toolkit: str
    ptq: Mapping[str, Any]
    cora: CoRaConfig | None
    exports: Sequence[Export]
    output: str
    document: Document = field(repr=False, compare=False)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()
    ) -> "Recipe":
        """Read a YAML file; each override, `data.images=24`, replaces one value.

        Raises:
            CoRaError: The file cannot be read, or a key or value is wrong.
        """
        document = Document.read(path)
        for text in overrides:
            document.override(text)
        names = [f.name for f in fields(cls) if f.name != "document"]
        document.known((), names)
        toolkit = document.values.get("toolkit")
        if toolkit not in TOOLKITS:
            wrong = "toolkit: " + (
                "choose one" if toolkit is None else f"{toolkit!r} is unknown"
            )
            message = f"{wrong}; use {' or '.join(TOOLKITS)}"
            raise document.error(("toolkit",), message)
        output = document.typed(
            ("output",), document.values.get("output", "cora-run"), str
        )
        recipe = cls(
            model=_section(document, ("model",), ModelSection),
            data=_data(document),
            test=_section(document, ("test",), ImageSection),
            toolkit=toolkit,
            ptq=document.typed(
                ("ptq",), document.values.get("ptq") or {}, dict[str, Any]
            ),
            cora=_cora(document),
            exports=_exports(document),
            output=output,
            document=document,
        )
        recipe._check_sources()
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML holds them; what is unset is left out."""
        whole = asdict(replace(self, document=Document("")))
        del whole["document"]
        whole["cora"] = self.cora.to_dict() if self.cora else False
        whole["exports"] = [
            {"format": e.format, "path": e.path, **e.options} for e in self.exports
        ]
        plain: dict[str, Any] = _without_none(whole)
        return plain

    def _check_sources(self) -> None:
        error = self.document.error
        _one_of(self.document, ("model",), self.model, MODELS)
        _one_of(self.document, ("data",), self.data, IMAGES)
        if any(getattr(self.test, name) for name in IMAGES):
            _one_of(self.document, ("test",), self.test, IMAGES)
        for key, section in (("data", self.data), ("test", self.test)):
            if section.args and not section.factory:
                message = f"{key}.args: they are for a factory, and there is none"
                raise error((key, "args"), message)
            if section.classes and not section.folder:
                message = f"{key}.classes: they name sub-folders, and none is given"
                raise error((key, "classes"), message)
            if section.images is not None and section.images < 1:
                message = f"{key}.images: {section.images}; pass 1 or more"
                raise error((key, "images"), message)
        if self.data.batch_size < 1:
            message = f"data.batch_size: {self.data.batch_size}; pass 1 or more"
            raise error(("data", "batch_size"), message)
        if self.model.factory and self.model.pretrained:
            message = "model.pretrained: a factory's weights are its own; leave it out"
            raise error(("model", "pretrained"), message)
        if self.model.checkpoint and self.model.pretrained:
            message = "model.pretrained: the checkpoint has the weights; leave it out"
            raise error(("model", "pretrained"), message)


def _section(document: Document, key: Key, kind: type[Section]) -> Section:
    hints = typing.get_type_hints(kind)
    values = document.known(key, hints)
    for name, value in values.items():
        document.typed((*key, name), value, hints[name])
    return kind(**values)


def _data(document: Document) -> DataSection:
    hints = typing.get_type_hints(DataSection)
    values = dict(document.known(("data",), hints))
    given = values.pop("preprocessing", None)
    for name, value in values.items():
        document.typed(("data", name), value, hints[name])
    if given is None:
        return DataSection(**values)
    preprocessing = _section(document, ("data", "preprocessing"), Preprocessing)
    for name in ("size", "resize"):
        side = getattr(preprocessing, name)
        sides = side if isinstance(side, list) else [] if side is None else [side]
        if any(s < 1 for s in sides) or (isinstance(side, list) and len(side) != 2):
            raise document.error(
                ("data", "preprocessing", name),
                f"data.preprocessing.{name}: {side}; pass a number of pixels, or a "
                "list of height and width",
            )
    return DataSection(**values, preprocessing=preprocessing)


def _one_of(
    document: Document, key: Key, section: object, names: tuple[str, ...]
) -> None:
    given = [name for name in names if getattr(section, name)]
    if len(given) != 1:
        what = " and ".join(given) + " exclude each other" if given else "no source"
        last = (*key, given[-1]) if given else key
        message = f"{key[0]}: {what}; give one of {', '.join(names)}"
        raise document.error(last, message)


def _cora(document: Document) -> CoRaConfig | None:
    value = document.values.get("cora", True)
    if value is False or value is None:
        return None
    if isinstance(value, dict):
        document.known(("cora",), (f.name for f in fields(CoRaConfig)))
    try:
        return CoRaConfig.of(value)
    except CoRaError as error:
        # Its messages begin with the field.
        named = str(error).partition(":")[0].removeprefix("cora.")
        key = () if named == "cora" else tuple(named.partition("[")[0].split("."))
        raise document.error(("cora", *key), f"cora: {error}") from error


def _exports(document: Document) -> tuple[Export, ...]:
    given = document.values.get("exports") or []
    document.typed(("exports",), given, list[Any])
    exports: list[Export] = []
    for index, item in enumerate(given):
        key: Key = ("exports", index)
        values = {"format": item} if isinstance(item, str) else item
        document.typed(key, values, dict[str, Any])
        if "format" not in values:
            message = f"exports.{index}: no format; name one, such as adapters"
            raise document.error(key, message)
        name = document.typed((*key, "format"), values["format"], str)
        path = values.get("path", name + suffix(name))
        document.typed((*key, "path"), path, str)
        if os.path.isabs(path) or ".." in path.split("/") or not path:
            raise document.error(
                (*key, "path"),
                f"exports.{index}.path: {path!r} leaves the output folder; name a file "
                "in it",
            )
        if path in [export.path for export in exports]:
            raise document.error(
                key, f"exports.{index}.path: {path} is written twice; name another file"
            )
        options = {k: v for k, v in values.items() if k not in ("format", "path")}
        exports.append(Export(name, path, options))
    return tuple(exports)


def suffix(format_: str) -> str:
    """The usual suffix of a format's file."""
    known = {"openvino": ".xml", "adapters": ".safetensors"}
    return known.get(format_, ".onnx" if "onnx" in format_ else ".pt")


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            k: _without_none(v) for k, v in value.items() if v is not None and v != {}
        }
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
