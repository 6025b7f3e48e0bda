"""Old spellings, read for one release with a warning that names the new one."""

import sys
import warnings
from collections.abc import Mapping
from typing import Any

from cora_plugin.adapters.errors import ConfigError

RENAMED = {"fit": "refine"}


def renewed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their present names.

    Raises:
        ConfigError: An old spelling and a new one contradict each other.
    """
    new = dict(given)
    for name, now in RENAMED.items():
        if name in new:
            if now in new:
                raise ConfigError((name,), f"now called {now}, which is given too")
            _warn(f"{name} is now called {now}; write {now}")
            new[now] = new.pop(name)
    if new.get("metric") == "rrr":
        if new.get("regression") is False:
            raise ConfigError(
                ("metric",), "'rrr' asks for the regression, and regression is false"
            )
        _warn("metric=rrr is now metric=qera-exact with regression=true, the defaults")
        new |= {"metric": "qera-exact", "regression": True}
    return new


def as_written(error: ConfigError, given: Mapping[str, Any]) -> ConfigError:
    """The error by the name that was given, so that its place is found."""
    for name, now in RENAMED.items():
        if error.key[:1] == (now,) and name in given:
            return type(error)((name, *error.key[1:]), error.problem, error.place)
    return error


def _warn(message: str) -> None:
    """Warn at the line outside of this package that the settings come from."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].startswith("cora_plugin."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FutureWarning, stacklevel=level)
