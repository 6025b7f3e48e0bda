"""What a recipe can say; `docs/recipes/README.md` explains every key."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from cora_plugin.adapters.errors import ConfigError, CoRaError, Key
from cora_plugin.config import CoRaConfig, QATConfig
from cora_plugin.config.declared import read, setting, settings
from cora_plugin.document import Document
from cora_plugin.integrations.points import toolkits
from cora_plugin.recipe.folder import expanded, inside

MODELS = ("timm", "torchvision", "factory")
IMAGES = ("folder", "glob", "factory")


@settings("model")
@dataclass(frozen=True)
class ModelSection:
    """Where the float model comes from: one of the first three."""

    timm: str | None = None
    torchvision: str | None = None
    factory: str | None = None
    pretrained: bool | None = None
    checkpoint: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


@settings("data", "preprocessing")
@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes a model's input; null: as the model's weights want it.

    `size` is the side that is cropped and `resize` the short side before that, in
    pixels, or each a list of height and width; `mean` and `std` those of red, green and
    blue where pixels are from 0 to 1.
    """

    size: int | list[int] | None = setting(None, least=1)
    resize: int | list[int] | None = setting(None, least=1)
    mean: list[float] | None = setting(
        None, "of pixels from 0 to 1", least=0, greatest=1
    )
    std: list[float] | None = setting(
        None, "of pixels from 0 to 1", above=0, greatest=1
    )
    interpolation: (
        Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None
    ) = None

    def __post_init__(self) -> None:
        for name in ("size", "resize"):
            side = getattr(self, name)
            if isinstance(side, list) and len(side) != 2:
                raise ConfigError(
                    ("data", "preprocessing", name),
                    f"{side}; pass a number of pixels, or a list of height and width",
                )
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and len(given) != 3:
                raise ConfigError(
                    ("data", "preprocessing", name),
                    f"{given}; pass a list of three, for red, green and blue",
                )


@dataclass(frozen=True)
class ImageSection:
    """Where images come from, one of the first three, and how many are drawn."""

    folder: str | None = None
    glob: str | None = None
    factory: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    classes: str | None = None
    images: int | None = setting(None, least=1)

    @property
    def source(self) -> tuple[str, str]:
        """The one of the first three that is given, and its value; else two blanks."""
        given = ((name, getattr(self, name)) for name in IMAGES)
        return next(((name, value) for name, value in given if value), ("", ""))


@settings("test")
@dataclass(frozen=True)
class TestSection(ImageSection):
    """The test images, and what judges by them; null: as the adapters' settings say."""

    objective: Literal["auto", "kl", "bernoulli", "mse", "cosine"] | None = None
    axis: int | None = None


def _preprocessing(value: Any) -> Any:
    return Preprocessing() if value is None else value


@settings("data")
@dataclass(frozen=True)
class DataSection(ImageSection):
    """The calibration images, and what test images share with them."""

    batch_size: int = setting(16, least=1)
    seed: int = setting(0, least=0, below=2**63)
    preprocessing: Preprocessing = setting(Preprocessing(), read=_preprocessing)


@dataclass(frozen=True)
class Export:
    """A file to write: a format of the toolkit, its options, and a name.

    An empty path stands for the format's name and suffix, which the toolkit knows.
    """

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
    test: TestSection
    toolkit: str
    ptq: Mapping[str, Any]
    cora: CoRaConfig | None
    qat: QATConfig | None
    exports: Sequence[Export]
    output: str
    device: str
    document: Document = field(repr=False, compare=False)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], overrides: Sequence[str] = ()
    ) -> "Recipe":
        """Read a YAML file; each override, `data.images=24`, replaces one value.

        Raises:
            FileError: The file cannot be read.
            ConfigError: A key or value is wrong.
        """
        return cls.of(Document.read(path), overrides)

    @classmethod
    def of(cls, document: Document, overrides: Sequence[str] = ()) -> "Recipe":
        """Take the values of a document; each override replaces one.

        Raises:
            ConfigError: A key or value is wrong.
        """
        for text in overrides:
            document.override(text)
        # What `cora-plugin compare` alone reads may stand there, too.
        names = [f.name for f in fields(cls) if f.name != "document"]
        document.known((), [*names, "compare"])
        toolkit = document.values.get("toolkit")
        if toolkit not in toolkits():
            wrong = "choose one" if toolkit is None else f"{toolkit!r} is unknown"
            problem = f"{wrong}; use {' or '.join(toolkits())}"
            raise document.error(("toolkit",), problem)
        output = document.typed(
            ("output",), document.values.get("output", "cora-run"), str
        )
        recipe = cls(
            model=read(ModelSection, document, ("model",)),
            data=read(DataSection, document, ("data",)),
            test=read(TestSection, document, ("test",)),
            toolkit=toolkit,
            ptq=document.typed(
                ("ptq",), document.values.get("ptq") or {}, dict[str, Any]
            ),
            cora=_cora(document),
            qat=_qat(document),
            exports=_exports(document),
            output=str(expanded(output)),
            device=_device(document),
            document=document,
        )
        recipe._check_sources()
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML holds them; what is unset is left out."""
        whole = asdict(replace(self, document=Document("")))
        del whole["document"]
        whole["cora"] = self.cora.to_dict() if self.cora else False
        whole["qat"] = asdict(self.qat) if self.qat else False
        whole["exports"] = [
            {"format": e.format, "path": e.path or None, **e.options}
            for e in self.exports
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
                problem = "they are for a factory, and there is none"
                raise error((key, "args"), problem)
            if section.classes and not section.folder:
                problem = "they name sub-folders, and none is given"
                raise error((key, "classes"), problem)
        if self.model.factory and self.model.pretrained:
            problem = "a factory's weights are its own; leave it out"
            raise error(("model", "pretrained"), problem)
        if self.model.checkpoint and self.model.pretrained:
            problem = "the checkpoint has the weights; leave it out"
            raise error(("model", "pretrained"), problem)


def _one_of(
    document: Document, key: Key, section: object, names: tuple[str, ...]
) -> None:
    given = [name for name in names if getattr(section, name)]
    if len(given) != 1:
        what = " and ".join(given) + " exclude each other" if given else "no source"
        last = (*key, given[-1]) if given else key
        problem = f"{what}; give one of {', '.join(names)}"
        raise document.error(key, problem, at=last)


def _device(document: Document) -> str:
    """What torch calls the device of the model: cpu, mps, cuda or cuda:1."""
    value = document.typed(("device",), document.values.get("device", "cpu"), str)
    name: str = value.strip().lower()
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) is None:
        problem = f"{value!r} is unknown; use cpu, cuda, cuda:1 (or another) or mps"
        raise document.error(("device",), problem)
    return name


def _cora(document: Document) -> CoRaConfig | None:
    value = document.values.get("cora", True)
    if value is False or value is None:
        return None
    if isinstance(value, dict):
        return CoRaConfig.read(document, ("cora",))
    try:
        return CoRaConfig.of(value)
    except CoRaError as error:
        raise document.error(("cora",), str(error)) from error


def _qat(document: Document) -> QATConfig | None:
    value = document.values.get("qat", False)
    if value is False or value is None:
        return None
    if value is True:
        return QATConfig()
    document.typed(("qat",), value, dict[str, Any])
    return read(QATConfig, document, ("qat",))


def _exports(document: Document) -> tuple[Export, ...]:
    given = document.values.get("exports") or []
    document.typed(("exports",), given, list[Any])
    exports: list[Export] = []
    for index, item in enumerate(given):
        key: Key = ("exports", index)
        values = {"format": item} if isinstance(item, str) else item
        document.typed(key, values, dict[str, Any])
        if "format" not in values:
            problem = "no format; name one, such as adapters"
            raise document.error(key, problem)
        name = document.typed((*key, "format"), values["format"], str)
        path = document.typed((*key, "path"), values.get("path", ""), str)
        if "path" in values and not (path and inside(path)):
            raise document.error(
                (*key, "path"),
                f"{path!r} leaves the output folder; name a file in it",
            )
        options = {k: v for k, v in values.items() if k not in ("format", "path")}
        exports.append(Export(name, path, options))
    return tuple(exports)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            k: _without_none(v) for k, v in value.items() if v is not None and v != {}
        }
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
