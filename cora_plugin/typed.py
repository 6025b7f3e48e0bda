"""Checks plain values, such as YAML's, against type annotations."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from cora_plugin.adapters.errors import ConfigError, Key, UnknownKeyError


def check(value: Any, hint: Any, key: Key = (), place: str = "") -> None:
    """Refuse a value that is not of an annotation's type.

    A whole number is a number too, true and false are neither, and a list will do for
    a tuple.

    Args:
        value: What was given.
        hint: The annotation.
        key: Leads to the value; the error says which of its items is wrong.
        place: Where it was written.

    Raises:
        ConfigError: It is something else.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    plain: Any = origin or hint
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(key, f"{value!r} holds a NUL, which no name may", place)
    if hint is Any:
        return
    if plain in (typing.Union, types.UnionType):
        if any(fits(value, part) for part in parts):
            return
        for part in parts:
            if _is_container(part) and fits(value, typing.get_origin(part) or part):
                check(value, part, key, place)  # One of its items is what is wrong.
    elif plain is typing.Literal:
        if any(type(value) is type(part) and value == part for part in parts):
            return
        names = ", ".join(map(str, parts))
        raise ConfigError(key, f"{value!r} is unknown; use one of {names}", place)
    elif plain in (list, tuple) and isinstance(value, list | tuple):
        for index, item in enumerate(value if parts else ()):
            check(item, parts[0], (*key, index), place)
        return
    elif _is_named(value) and _is_container(hint) and isinstance(value, plain):
        for name, item in value.items():
            check(item, parts[1] if parts else Any, (*key, name), place)
        return
    elif _is_leaf(value, plain):
        return
    raise ConfigError(key, f"{value!r} is not {_wording(hint)}", place)


def fits(value: Any, hint: Any) -> bool:
    """Whether `check` takes the value."""
    try:
        check(value, hint)
    except ConfigError:
        return False
    return True


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The words for an unknown name, with the nearest known one."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    way_out = f"did you mean {close[0]}?" if close else f"use {', '.join(names)}"
    if not close and len(names) > 100:
        way_out = f"there are {len(names)}, none like it"
    return f"unknown {what} {name!r}; {way_out}"


def check_names(
    given: Iterable[str], known: Iterable[str], key: Key = (), place: str = ""
) -> None:
    """Refuse names that are not known.

    Raises:
        UnknownKeyError: There is one; it lists the known, and which was perhaps meant.
    """
    names = list(known)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            guess = f"did you mean {close[0]}? The" if close else "the"
            problem = f"unknown key {name!r}; {guess} keys are {', '.join(names)}"
            raise UnknownKeyError((*key, name), problem, place)


def _is_named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_leaf(value: Any, plain: Any) -> bool:
    if plain is None or plain is type(None):
        return value is None
    if isinstance(value, bool):
        return plain is bool
    if plain is float:
        return isinstance(value, int | float)
    # A type variable and the like are no types; nothing can be said of them.
    return not isinstance(plain, type) or (
        isinstance(value, plain) and not isinstance(value, Mapping)
    )


def _is_container(hint: Any) -> bool:
    plain = typing.get_origin(hint) or hint
    return isinstance(plain, type) and issubclass(plain, list | tuple | Mapping)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _wording(hint: Any) -> str:
    plain, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if plain in (typing.Union, types.UnionType):
        return " or ".join(_wording(part) for part in parts)
    if plain is typing.Literal:
        return " or ".join(map(str, parts))
    if plain is type(None):
        return "null"
    if _is_container(hint):
        return "a list" if plain in (list, tuple) else "a mapping of names to values"
    return _WORDS.get(plain, str(hint))
