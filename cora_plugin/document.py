"""YAML that remembers its lines, so that an error can say where it was written."""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cora_plugin.adapters.errors import CoRaError

Key = tuple[str | int, ...]
"""Where a value stands: `("exports", 0, "path")`."""


class Document:
    """The values of a YAML file, and the line of each.

    Args:
        name: What errors call the file.
        values: Its mapping, of plain values.
        lines: The line of each value, counted from 1.
    """

    def __init__(
        self,
        name: str,
        values: dict[str, Any] | None = None,
        lines: Mapping[Key, int] | None = None,
    ) -> None:
        self.name = name
        self.values = {} if values is None else values
        self._lines = dict(lines or {})
        self._given: dict[Key, str] = {}

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Document":
        """Read a file with a mapping at its top.

        Raises:
            CoRaError: The file is absent or unreadable, no YAML, no mapping, or has a
                key twice.
        """
        name = str(path)
        try:
            loader = _Loader(Path(path).read_text(encoding="utf-8"))
            node = loader.get_single_node()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise CoRaError(f"{name}: cannot be read: {why}") from error
        except yaml.YAMLError as error:
            raise CoRaError(_syntax(name, error)) from error
        lines: dict[Key, int] = {}
        try:
            values = {} if node is None else _plain(loader, node, (), lines, name)
        except yaml.YAMLError as error:
            raise CoRaError(_syntax(name, error)) from error
        if not isinstance(values, dict):
            raise CoRaError(f"{name}: not a mapping of keys to values")
        return cls(name, values, lines)

    def override(self, text: str) -> None:
        """Set one value: `data.images=24`; the value is read as YAML.

        Raises:
            CoRaError: The text has no `=`, or leads into something that has no keys.
        """
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted.strip():
            raise CoRaError(f"--set {text}: pass key=value, such as data.images=24")
        value = parse_value(raw)
        into: Any = self.values
        step: Any
        key: Key = ()
        *parents, last = dotted.strip().split(".")
        for part in parents:
            step = _step(into, part, text)
            key += (step,)
            if isinstance(into, dict) and not isinstance(into.get(step), dict | list):
                into[step] = {}
            into = into[step]
        step = _step(into, last, text)
        into[step] = value
        self._given[(*key, step)] = f"--set {text}"

    def error(self, key: Key, message: str) -> CoRaError:
        """An error about the value at `key`, or about the nearest that was written."""
        for length in range(len(key), 0, -1):
            part = key[:length]
            if part in self._given:
                return CoRaError(f"{self._given[part]}: {message}")
            if part in self._lines:
                return CoRaError(f"{self.name}:{self._lines[part]}: {message}")
        return CoRaError(f"{self.name}: {message}")

    def known(self, key: Key, allowed: Iterable[str]) -> dict[str, Any]:
        """The mapping at `key`; none counts as an empty one.

        Raises:
            CoRaError: It is something else, or has a key that is not allowed.
        """
        values: Any = self.values
        step: Any
        for step in key:
            values = values[step] if isinstance(values, list) else values.get(step)
        values = {} if values is None else values
        path = dotted(key)
        if not isinstance(values, dict):
            raise self.error(key, f"{path}: {values!r} is not a mapping of its keys")
        names = list(allowed)
        for name in values:
            if name not in names:
                raise self.error((*key, name), unknown("key", name, names, path))
        return values

    def typed(self, key: Key, value: Any, hint: Any) -> Any:
        """The value, if it is of the type that was declared.

        Raises:
            CoRaError: It is not.
        """
        if not fits(value, hint):
            what = f"{value!r} is not {_wording(hint)}"
            raise self.error(key, f"{dotted(key)}: {what}")
        return value


def parse_value(text: str) -> Any:
    """Read the value of a flag as YAML: `24`, `1e-4`, `[a, b]`, `{classifier: 0}`.

    Raises:
        CoRaError: It is none.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise CoRaError(f"{text!r} is no YAML value; put it in quotes") from error


def dotted(key: Key) -> str:
    """A key as it is written: `exports.0.path`."""
    return ".".join(map(str, key))


def unknown(what: str, name: str, known: Iterable[str], where: str = "") -> str:
    """Say that a name is unknown, and which was perhaps meant."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    way_out = f"did you mean {close[0]}?" if close else f"use {', '.join(names)}"
    if not close and len(names) > 100:
        way_out = f"there are {len(names)}, none like it"
    place = f"{where}: " if where else ""
    return f"{place}unknown {what} {name!r}; {way_out}"


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotation's type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if hint is None or hint is type(None):
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    kind: Any = origin or hint
    if kind is tuple:
        kind = list  # As YAML has it.
    if not isinstance(kind, type):
        return True
    right = isinstance(value, kind)
    if right and kind is list and parts:
        return all(fits(item, parts[0]) for item in value)
    return right


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _wording(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_wording(part) for part in parts)
    if origin is typing.Literal:
        return " or ".join(map(str, parts))
    if hint is type(None):
        return "null"
    if (origin or hint) in (list, tuple):
        return "a list"
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        return "a mapping"
    return _WORDS.get(hint, str(hint))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is a number as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _plain(
    loader: yaml.SafeLoader, node: Any, key: Key, lines: dict[Key, int], name: str
) -> Any:
    """A node's plain value; the lines of all keys below it are noted."""
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            items.append(_plain(loader, item, (*key, index), lines, name))
        return items
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    values: dict[str, Any] = {}
    written = {id(k) for k, _ in node.value}
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        step = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(step, str):
            raise CoRaError(f"{name}:{line}: {step!r} is not a key; put it in quotes")
        if step in values and id(key_node) in written and (*key, step) in lines:
            first = lines[(*key, step)]
            path = dotted((*key, step))
            raise CoRaError(f"{name}:{line}: {path} stands on line {first} already")
        if id(key_node) in written:
            lines[(*key, step)] = line
        values[step] = _plain(loader, value_node, (*key, step), lines, name)
    return values


def _step(into: Any, part: str, text: str) -> Any:
    if isinstance(into, dict):
        return part
    if isinstance(into, list) and part.isdecimal() and int(part) < len(into):
        return int(part)
    raise CoRaError(f"--set {text}: {part!r} leads nowhere; there are no keys there")


def _syntax(name: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = name if mark is None else f"{name}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{place}: not YAML: {problem}"
