"""Reads what "near to the float model" means: a name, a function, or either by output.

The distances themselves are `cora_plugin.objective`'s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cora_plugin.adapters.errors import ConfigError, Key
from cora_plugin.typed import check, check_names

AUTO = "auto"
NAMES = (AUTO, "kl", "bernoulli", "mse", "cosine")
KEY: Key = ("objective",)


@dataclass(frozen=True)
class Part:
    """How one output is measured: by a name of `NAMES` or a function; axis, weight."""

    how: str | Callable[[Any, Any], Any] = AUTO
    axis: int | None = None
    weight: float = 1.0


def checked(value: Any) -> Any:
    """An objective as it was given, with outputs named by text.

    Raises:
        ConfigError: It is none.
    """
    if not isinstance(value, Mapping):
        _part(value, KEY)
        return value
    if not value:
        raise ConfigError(KEY, "no output is named; name at least one")
    named = {str(name): each for name, each in value.items()}
    for name, each in named.items():
        _part(each, (*KEY, name))
    return named


def part_of(value: Any, axis: int | None = None) -> Part:
    """One output's part of a checked objective.

    Args:
        value: A name, a function, or a mapping of `of`, `axis` and `weight`.
        axis: The axis where the part names none.
    """
    part = _part(value, KEY)
    return part if part.axis is not None else Part(part.how, axis, part.weight)


def plain(value: Any) -> Any:
    """An objective as YAML and JSON hold it; functions are named."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    if callable(value):
        return f"function {getattr(value, '__name__', type(value).__name__)}"
    return value


def _part(value: Any, key: Key) -> Part:
    if callable(value):
        return Part(value)
    if isinstance(value, str):
        if value not in NAMES:
            problem = f"{value!r} is unknown; use one of {', '.join(NAMES)}"
            raise ConfigError(key, f"{problem}, or a function of two outputs")
        return Part(value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            key,
            f"{value!r} is no objective; use one of {', '.join(NAMES)}, a function of "
            "two outputs, or a mapping of outputs to these",
        )
    names = ("of", "axis", "weight")
    check_names(value, names, key)
    how = _part(value.get("of", AUTO), (*key, "of")).how
    axis, weight = value.get("axis"), value.get("weight", 1.0)
    if axis is not None:
        check(axis, int, (*key, "axis"))
    check(weight, float, (*key, "weight"))
    if not 0 < weight < float("inf"):
        raise ConfigError((*key, "weight"), f"{weight} is no weight; use more than 0")
    return Part(how, axis, float(weight))
