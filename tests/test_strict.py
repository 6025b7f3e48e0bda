import json

from hypothesis import given
from hypothesis import strategies as st

from cora_plugin.strict import strict_json

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), values, max_size=3))
def test_any_values_become_json_that_all_parsers_read(values):
    def refuse(word):
        raise AssertionError(word)

    json.loads(strict_json(values), parse_constant=refuse)


def test_what_is_null_says_why():
    text = strict_json({"a": [1.0, float("inf")], "b": {"c": float("nan"), "d": None}})
    assert json.loads(text) == {
        "a": [1.0, None],
        "b": {"c": None, "d": None},
        "not_finite": {"a.1": "inf", "b.c": "nan"},
    }
    assert "not_finite" not in strict_json({"a": 1})
