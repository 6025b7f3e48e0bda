"""A value is of its annotation's type, or the error says which part of it is not."""

from collections.abc import Mapping
from typing import Any, Literal

import pytest

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.typed import check, fits


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True),
        (True, int, False),
        (1, float, True),
        (1.5, int, False),
        (None, int | None, True),
        ("a", int | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ({"a": 1}, Mapping[str, Any], True),
        ([], Mapping[str, Any], False),
        (object(), Any, True),
        (0, bool, False),
        (True, float, False),
        ([1.5, True], list[float], False),
        ((1, 2.5), tuple[float, ...], True),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": 1.5}, Mapping[str, int], False),
        ({1: 1}, Mapping[str, Any], False),
        (1.0, Literal[1, 2], False),
        (True, Literal[1, 2], False),
        (True, Any, True),
    ],
)
def test_fits(value, hint, right):
    assert fits(value, hint) is right


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("x", int, "a: 'x' is not a whole number"),
        ([1, "x"], list[float], "a.1: 'x' is not a number"),
        ([1, "x"], int | list[int] | None, "a.1: 'x' is not a whole number"),
        ("x", int | list[int], "a: 'x' is not a whole number or a list"),
        ({"b": {"c": 1.5}}, dict[str, dict[str, int]], "a.b.c: 1.5 is not a whole n"),
        ("x", Literal["b", "c"], "a: 'x' is unknown; use one of b, c"),
        (3, Mapping[str, int], "a: 3 is not a mapping of names to values"),
        (3, Literal["b", "c"] | None, "a: 3 is not b or c or null"),
    ],
)
def test_the_part_that_is_wrong_is_named(value, hint, message):
    with pytest.raises(ConfigError) as caught:
        check(value, hint, ("a",))
    assert str(caught.value).startswith(message)
