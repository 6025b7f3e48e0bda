"""Values that remember where they were written, so that an error can say it."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cora_plugin.adapters.errors import ConfigError, CoRaError, FileError, Key, dotted
from cora_plugin.typed import check, check_names


class Document:
    """A mapping of plain values, and where each was written.

    Args:
        name: The file, which errors name; blank for what was in none.
        values: The mapping.
        lines: The line of each value in the file, counted from 1.
    """

    def __init__(
        self,
        name: str = "",
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
            FileError: The file is absent or unreadable, no YAML, no mapping, or has a
                key twice.
        """
        name = str(path)
        try:
            loader = _Loader(Path(path).read_text(encoding="utf-8"))
            node = loader.get_single_node()
        except OSError as error:
            raise FileError(f"{name}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            problem = f"byte {error.start} is not UTF-8; save it as text in UTF-8"
            raise FileError(f"{name}: cannot be read: {problem}") from error
        except yaml.YAMLError as error:
            raise FileError(_syntax(name, error)) from error
        except RecursionError as error:
            raise FileError(f"{name}: {_DEEP}") from error
        lines: dict[Key, int] = {}
        try:
            values = {} if node is None else _plain(loader, node, (), lines, name)
        except yaml.YAMLError as error:
            raise FileError(_syntax(name, error)) from error
        except RecursionError as error:
            raise FileError(f"{name}: {_DEEP}") from error
        if not isinstance(values, dict):
            raise FileError(f"{name}: not a mapping of keys to values")
        return cls(name, values, lines)

    @classmethod
    def of_flags(cls, text: str, alone: str) -> "Document":
        """Read the text of a flag: `budget=0.05,butterworth.iterations=40`.

        Values are read as YAML; a dot leads into a mapping, whose own keys may hold
        dots: `ranks.blocks.0.conv=4`.

        Args:
            text: The text.
            alone: The key of a value that comes without one.

        Raises:
            ConfigError: A key is given twice, or a value is no YAML.
        """
        document = cls()
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, raw = part.partition("=")
            if not equals:
                name, raw = alone, part
            key: Key = tuple(step.strip() for step in name.split(".", 1))
            into: Any = document.values
            if len(key) == 2:
                into = into.setdefault(key[0], {})
            if not isinstance(into, dict) or key[-1] in into:
                raise ConfigError(key, f"given twice in {text!r}")
            into[key[-1]] = parse_value(raw.strip(), key)
            document._given[key] = part
        return document

    def override(self, text: str) -> None:
        """Set one value: `data.images=24`; the value is read as YAML.

        Raises:
            ConfigError: The text has no `=`, or leads into something without keys.
        """
        name, equals, raw = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(
                (), "pass key=value, such as data.images=24", f"--set {text}"
            )
        try:
            value = parse_value(raw)
        except ConfigError as error:
            raise ConfigError((), error.problem, f"--set {text}") from error
        self.put(name.strip().split("."), value, f"--set {text}")

    def put(self, path: Iterable[str], value: Any, place: str) -> None:
        """Set one value, and make the mappings that lead to it where there are none.

        Args:
            path: Its key; the items of a list are counted from 0.
            value: The value.
            place: Where it was written, for errors.

        Raises:
            ConfigError: The path leads into something that has no keys.
        """
        into: Any = self.values
        step: Any
        key: Key = ()
        *parents, last = path
        for part in parents:
            step = _step(into, part, place)
            key += (step,)
            if isinstance(into, dict) and not isinstance(into.get(step), dict | list):
                into[step] = {}
            into = into[step]
        step = _step(into, last, place)
        into[step] = value
        self._given[(*key, step)] = place

    def place(self, key: Key) -> str:
        """Where the value at `key` was written, or the mapping nearest above it."""
        for length in range(len(key), 0, -1):
            part = key[:length]
            if part in self._given:
                return self._given[part]
            if part in self._lines:
                return f"{self.name}:{self._lines[part]}"
        return self.name

    def error(
        self,
        key: Key,
        problem: str,
        of: type[CoRaError] = ConfigError,
        at: Key | None = None,
    ) -> CoRaError:
        """An error about the value at `key`, with the place where it was written.

        Args:
            key: What the message begins with.
            problem: What is wrong with it, and what would be right.
            of: The class of the error.
            at: Whose place the message gives, by default that of `key`.
        """
        place = self.place(key if at is None else at)
        if issubclass(of, ConfigError):
            return of(key, problem, place)
        parts = (place, dotted(key), problem)
        return of(": ".join(part for part in parts if part))

    def at(self, key: Key) -> dict[str, Any]:
        """The mapping at `key`; none counts as an empty one.

        Raises:
            ConfigError: It is something else.
        """
        values: Any = self.values
        step: Any
        for step in key:
            values = values[step] if isinstance(values, list) else values.get(step)
        values = {} if values is None else values
        self.typed(key, values, dict[str, Any])
        found: dict[str, Any] = values
        return found

    def known(self, key: Key, allowed: Iterable[str]) -> dict[str, Any]:
        """The mapping at `key`, if all its keys are allowed.

        Raises:
            ConfigError: It is something else, or has a key that is not allowed.
        """
        values, names = self.at(key), list(allowed)
        for name in values:
            check_names([name], names, key, self.place((*key, name)))
        return values

    def typed(self, key: Key, value: Any, hint: Any) -> Any:
        """The value, if it is of the type that was declared.

        Raises:
            ConfigError: It is not.
        """
        try:
            check(value, hint, key)
        except ConfigError as error:
            raise self.located(error) from None
        return value

    def located(self, error: ConfigError, above: Key = ()) -> ConfigError:
        """The error with the place where its value was written.

        Args:
            error: About a value of this document.
            above: The key of the mapping that the error's key is relative to.
        """
        key = above + error.key
        return type(error)(key, error.problem, self.place(key))


def parse_value(text: str, key: Key = ()) -> Any:
    """Read the value of a flag as YAML: `24`, `1e-4`, `[a, b]`, `{classifier: 0}`.

    Args:
        text: The value.
        key: What it is the value of, for the error.

    Raises:
        ConfigError: It is none.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = f"{text!r} is no YAML value; put it in quotes"
        raise ConfigError(key, problem) from error


MOST = 100_000
"""Values that a file may hold, those that aliases repeat counted each time."""

DEPTH = 100
"""Levels of lists and mappings that a file may have."""

_DEEP = "is nested too deep, or holds an alias of itself"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-4 is a number as in YAML 1.2.

    `count` is the number of values that were made. What is nested deeper than `DEPTH`
    is refused at once: the scanner's work at each bracket grows with those around it.
    """

    count = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Scan a bracket that opens."""
        if self.flow_level >= DEPTH:
            raise RecursionError
        super().fetch_flow_collection_start(token)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _plain(
    loader: _Loader, node: Any, key: Key, lines: dict[Key, int], name: str
) -> Any:
    """A node's plain value; the lines of all keys below it are noted.

    Raises:
        FileError: A key is twice there, a value impossible, or there are too many.
    """
    loader.count += 1
    if loader.count > MOST:
        raise FileError(f"{name}: aliases make more than {MOST} values of it")
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
            items.append(_plain(loader, item, (*key, index), lines, name))
        return items
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except ValueError as error:  # A date that is none, or too many digits.
            problem = f"{name}:{node.start_mark.line + 1}: not a value: {error}"
            raise FileError(problem) from error
    values: dict[str, Any] = {}
    written = {id(k) for k, _ in node.value}
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        step = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(step, str):
            raise FileError(f"{name}:{line}: {step!r} is not a key; put it in quotes")
        if step in values and id(key_node) in written and (*key, step) in lines:
            first = lines[(*key, step)]
            path = dotted((*key, step))
            raise FileError(f"{name}:{line}: {path} stands on line {first} already")
        if id(key_node) in written:
            lines[(*key, step)] = line
        values[step] = _plain(loader, value_node, (*key, step), lines, name)
    return values


def _step(into: Any, part: str, place: str) -> Any:
    if isinstance(into, dict):
        return part
    if isinstance(into, list) and part.isdecimal() and int(part) < len(into):
        return int(part)
    raise ConfigError((), f"{part!r} leads nowhere; there are no keys there", place)


def _syntax(name: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = name if mark is None else f"{name}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "'\\t'" in problem:
        problem += "; indent with blanks"
    return f"{place}: not YAML: {problem}"
