"""JSON that every parser reads: no NaN or infinity in it, but null and a reason."""

import json
import math
from collections.abc import Mapping
from typing import Any

REASONS = "not_finite"
"""The key of what stands as null: dotted keys, and the numbers that were there."""


def strict_json(values: Mapping[str, Any]) -> str:
    """The JSON text of a mapping; numbers that are not finite are null.

    Their places and values are listed at its end, under `not_finite`.
    """
    found: dict[str, str] = {}
    plain = _finite(values, "", found)
    if found:
        plain[REASONS] = found
    return json.dumps(plain, indent=2, default=str, allow_nan=False)


def _finite(value: Any, path: str, found: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found[path] = str(value)
        return None
    if isinstance(value, Mapping):
        items = ((str(key), item) for key, item in value.items())
        return {key: _finite(item, _join(path, key), found) for key, item in items}
    if isinstance(value, list | tuple):
        return [_finite(v, _join(path, i), found) for i, v in enumerate(value)]
    return value


def _join(path: str, step: object) -> str:
    return f"{path}.{step}" if path else str(step)
