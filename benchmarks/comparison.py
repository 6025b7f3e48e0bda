"""Two records side by side: every value that differs, and by how much."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """A value of two records, by its path: `nncf/settings/default/report/after/kl`."""

    path: str
    before: Any
    after: Any

    @property
    def is_bytes(self) -> bool:
        """Whether it is of a file's bytes alone, not of what the file holds."""
        return "/file/" in self.path

    def __str__(self) -> str:
        """Both values, and how far numbers are apart."""
        text = f"{self.path}: {_short(self.before)} -> {_short(self.after)}"
        apart = _apart(self.before, self.after)
        return text if apart is None else f"{text} ({apart})"


def differences(before: Any, after: Any, path: str) -> Iterator[Difference]:
    """Every leaf that is not the same to the last digit; lists of numbers as one."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            pair = before.get(key, ABSENT), after.get(key, ABSENT)
            yield from differences(*pair, f"{path}/{key}")
    elif _has_parts(before) and _has_parts(after) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    # 1 and 1.0, and 1 and True, are not the same in a report.
    elif type(before) is not type(after) or before != after:
        yield Difference(path, before, after)


def ignored(difference: Difference, patterns: Sequence[str]) -> bool:
    """Whether one of some globs fits the path."""
    return any(fnmatchcase(difference.path, pattern) for pattern in patterns)


def _has_parts(value: Any) -> bool:
    return isinstance(value, list) and not _are_numbers(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _apart(before: Any, after: Any) -> str | None:
    """The relative difference of numbers."""
    if _is_number(before) and _is_number(after):
        return f"{_relative(before, after):.2g} relative"
    if _are_numbers(before) and _are_numbers(after) and len(before) == len(after):
        pairs = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
        size = max(map(abs, before)) or 1.0
        most = max((abs(b - a) for b, a in pairs), default=0.0)
        return f"{len(pairs)} of {len(before)} differ, by {most / size:.2g} of the most"
    return None


def _relative(before: float, after: float) -> float:
    return abs(before - after) / (max(abs(before), abs(after)) or 1.0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:67]}..."
