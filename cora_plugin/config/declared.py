"""Settings that are declared once: type, default, bounds, and what they do.

One declaration serves keyword arguments, mappings, files and flags, their help and the
README's table. A setting is a field of a frozen dataclass:

    @settings("search")
    @dataclass(frozen=True)
    class Search:
        steps: int = setting(250, "steps of Adam", least=1)

`Search(steps=0)` raises `search.steps: 0 is out of range; use 1 or more`.

This and `cora_plugin.typed` are all of it. A validation library would have to be made
strict field by field, and its errors be translated into the words and keys above.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cora_plugin.adapters.errors import ConfigError, Key
from cora_plugin.document import Document
from cora_plugin.typed import check, check_names

Settings = TypeVar("Settings")
Given = dict[str, Any]


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number; infinity and NaN are always outside."""

    least: float | None = None
    above: float | None = None
    greatest: float | None = None
    below: float | None = None
    among: tuple[float, ...] = ()

    def allow(self, value: float) -> bool:
        """Whether a value is within the bounds."""
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.greatest is None or value <= self.greatest)
            and (self.below is None or value < self.below)
            and (not self.among or value in self.among)
        )

    def check(self, key: Key, value: Any) -> None:
        """Refuse a value with a number in it that is out of bounds.

        Raises:
            ConfigError: There is one; it says where.
        """
        for where, number in _numbers(key, value):
            if not self.allow(number):
                raise ConfigError(where, f"{number} is out of range; use {self}")

    def __str__(self) -> str:
        """The bounds in words, for errors."""
        if self.among:
            return f"one of {', '.join(map(str, self.among))}"
        words = {
            f"{self.least} or more": self.least,
            f"more than {self.above}": self.above,
            f"at most {self.greatest}": self.greatest,
            f"less than {self.below}": self.below,
        }
        return " and ".join(word for word, end in words.items() if end is not None)


@dataclass(frozen=True)
class Declared:
    """The help, bounds and reader of a setting; its field has type and default.

    `text` is its help and its line in the README. `read` turns what was given, which
    may be shorter than the type, into a value that is then checked.
    """

    text: str = ""
    bounds: Bounds | None = None
    read: Callable[[Any], Any] | None = None


def setting(
    default: Any,
    text: str = "",
    read: Callable[[Any], Any] | None = None,
    **bounds: Any,
) -> Any:
    """A field of a settings class; see `Declared` and `Bounds`."""
    limits = Bounds(**bounds) if bounds else None
    declared = {"declared": Declared(text, limits, read)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=declared)
    return dataclasses.field(default=default, metadata=declared)


def settings(
    *root: str, complete: Callable[[Given], Given] | None = None
) -> Callable[[type[Settings]], type[Settings]]:
    """Make a dataclass check what its constructor is given.

    Args:
        root: The key of its mapping in a document, for errors.
        complete: Called first with the arguments by name; returns those to use.

    Raises:
        ConfigError: From the constructor: an argument is unknown or impossible.
    """

    def decorate(cls: type[Settings]) -> type[Settings]:
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(cls)
        plain: Callable[..., None] = cls.__init__

        @functools.wraps(plain)
        def init(self: Settings, *args: Any, **given: Any) -> None:
            by_place = dict(zip(fields, args, strict=False))
            if len(args) > len(fields) or by_place.keys() & given.keys():
                plain(self, *args, **given)  # Python says what is wrong.
            given = by_place | given
            if complete is not None:
                given = complete(given)
            check_names(given, fields, root)
            checked = {
                name: _checked((*root, name), value, hints[name], fields[name])
                for name, value in given.items()
            }
            plain(self, **checked)

        cls.__init__ = init  # type: ignore[assignment]
        return cls

    return decorate


def read(cls: type[Settings], document: Document, root: Key) -> Settings:
    """Make settings of a mapping in a document, at the class' root.

    Raises:
        ConfigError: A key is unknown or a value impossible; it says where it stands.
    """
    values = document.at(root)
    try:
        return cls(**values)
    except ConfigError as error:
        raise document.located(error) from error


def described(
    cls: type[Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """Each setting, nested ones included: its key, its default, its help."""
    for field in dataclasses.fields(cls):
        path = (*above, field.name)
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if _is_settings(type(default)):
            yield from described(type(default), path)
        else:
            yield path, default, field.metadata["declared"].text


def _is_settings(cls: type[Any]) -> bool:
    return dataclasses.is_dataclass(cls) and any(
        "declared" in field.metadata for field in dataclasses.fields(cls)
    )


def _checked(key: Key, value: Any, hint: Any, field: "dataclasses.Field[Any]") -> Any:
    """The value of a setting by what was given for it."""
    declared = field.metadata.get("declared", Declared())
    if declared.read is not None:
        value = declared.read(value)
    if isinstance(hint, type) and _is_settings(hint):
        if isinstance(value, hint):
            return value
        check(value, Mapping[str, Any], key)
        return hint(**value)
    check(value, hint, key)
    if declared.bounds:
        declared.bounds.check(key, value)
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if typing.get_origin(hint) is tuple else value


def _numbers(key: Key, value: Any) -> Iterator[tuple[Key, float]]:
    """The numbers in a value, and the key of each."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers((*key, name), item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers((*key, index), item)
