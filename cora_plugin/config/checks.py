"""Checks of settings; an error names the setting, its value and the way out."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cora_plugin.adapters.errors import CoRaError


def mapping(name: str, value: Any) -> Mapping[str, Any]:
    """A mapping whose keys are names."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise CoRaError(
            f"{name}: {value!r} is not a mapping of names to values, {{name: value}}"
        )
    return value


def known(kind: type[Any], values: Any, where: str) -> Mapping[str, Any]:
    """The mapping, if all its keys are fields of a configuration."""
    known = [f.name for f in fields(kind)]
    for key in mapping(where, values):
        if key not in known:
            raise CoRaError(
                f"{where}: unknown key {key!r}; the keys are {', '.join(known)}"
            )
    return values  # type: ignore[no-any-return]


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """One of a few names."""
    if value not in allowed:
        raise CoRaError(
            f"{name}: {value!r} is unknown; use one of {', '.join(allowed)}"
        )


def whole(name: str, value: Any) -> None:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise CoRaError(f"{name}: {value!r} is not a whole number")


def number(name: str, value: Any) -> None:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CoRaError(f"{name}: {value!r} is not a number")


def check(holds: bool, name: str, value: Any, allowed: str) -> None:
    """Within the range that `allowed` tells of."""
    if not holds:
        raise CoRaError(f"{name}: {value} is out of range; use {allowed}")
