"""YAML keeps its lines, whichever way a value came into it."""

import pickle
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cora_plugin import CoRaError
from cora_plugin.adapters.errors import ConfigError
from cora_plugin.document import DEPTH, Document, parse_value


def read(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return Document.read(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abc é:#", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=3), plain, max_size=4))
def test_values_are_those_of_yaml(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert Document.read(path).values == values


def test_each_value_knows_its_line(tmp_path):
    text = "a: 1\nb:\n  c:\n    - x\n    - {d: 2}\n"
    document = read(tmp_path, text)
    name = tmp_path / "a.yaml"
    for key, line in {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 3,
        ("b", "c", 1, "d"): 5,
        ("b", "absent", "below"): 2,
    }.items():
        assert str(document.error((), "wrong", at=key)) == f"{name}:{line}: wrong"
    assert str(document.error(("absent",), "wrong")) == f"{name}: absent: wrong"


def test_merged_keys_are_no_doubles(tmp_path):
    document = read(tmp_path, "base: &b {x: 1, y: 1}\nsame:\n  <<: *b\n  y: 2\n")
    assert document.values["same"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", ":3: a stands on line 1 already"),
        ("1: 2", ":1: 1 is not a key; put it in quotes"),
        ("- a", "not a mapping of keys"),
        ("a: [1", ":1: not YAML: "),
        ("a: !!python/name:os.system x", ":1: not YAML: could not determine a constr"),
        ("a: *b", "not YAML: found undefined alias"),
    ],
)
def test_what_cannot_be_read_is_named(text, message, tmp_path):
    with pytest.raises(CoRaError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides(tmp_path):
    document = read(tmp_path, "a: {b: 1}\nl: [{c: 1}, 2]\n")
    for text in ("a.b=1e-4", "l.0.c=[x, y]", "new.deep=true", "a.e=", "l.1=z"):
        document.override(text)
    assert document.values == {
        "a": {"b": 1e-4, "e": None},
        "l": [{"c": ["x", "y"]}, "z"],
        "new": {"deep": True},
    }
    assert str(document.error(("a", "b"), "no")) == "--set a.b=1e-4: a.b: no"


@pytest.mark.parametrize("text", ["a", "=1", "l.7=1", "l.x=1", "a=[", "l.1.b=3"])
def test_overrides_that_lead_nowhere(text, tmp_path):
    with pytest.raises(CoRaError):
        read(tmp_path, "a: 1\nl: [{c: 1}, 2]\n").override(text)
    with pytest.raises(CoRaError, match=r"--set a=\{\{: .* is no YAML value"):
        Document().override("a={{")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E3", -2000.0), ("0.05 params", "0.05 params"), ("3", 3)],
)
def test_numbers(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_the_text_of_a_flag_is_read_as_yaml():
    document = Document.of_flags("0.05 params, a=1e-4,b.c.d=[x], b.e = off", "budget")
    assert document.values == {
        "budget": "0.05 params",
        "a": 1e-4,
        "b": {"c.d": ["x"], "e": False},
    }
    assert document.place(("a",)) == "a=1e-4"
    assert document.place(("b", "e")) == "b.e = off"
    assert document.place(("budget",)) == "0.05 params"


def test_what_came_in_no_file_has_no_place():
    document = Document(values={"a": 1})
    assert document.place(("a",)) == ""
    assert str(document.error(("a",), "wrong")) == "a: wrong"


def test_a_located_error_keeps_its_class_and_finds_its_line(tmp_path):
    document = read(tmp_path, "a:\n  b: 1\n")
    with pytest.raises(ConfigError) as caught:
        document.known(("a",), ["bb"])
    located = document.located(type(caught.value)(("b",), "wrong"), above=("a",))
    for error in (caught.value, located):
        assert error.key == ("a", "b")
        assert str(error).startswith(f"{tmp_path / 'a.yaml'}:2: a: ")
    assert "unknown key 'b'; did you mean bb? The keys are bb" in str(caught.value)


def test_an_error_survives_pickling():
    error = ConfigError(("a", 0), "wrong", "here")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "here: a.0: wrong"
    assert again.key == ("a", 0)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases make more than 100000 values"),
        ("model: &a {args: *a}\n", "nested too deep, or holds an alias of itself"),
        ("a: " + "[" * 2000 + "]" * 2000, "nested too deep"),
        ("a: 1\nb: 2020-99-99\n", ":2: not a value: month must be"),
        ("a: " + "9" * 5000, ":1: not a value: Exceeds the limit"),
    ],
)
def test_what_is_no_plain_mapping_ends_with_one_line(tmp_path, text, message):
    with pytest.raises(CoRaError) as error:
        read(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_encodings_and_tabs_are_told_with_the_way_out(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(CoRaError, match="byte 0 is not UTF-8; save it as text in UTF"):
        Document.read(path)
    with pytest.raises(CoRaError, match=r":2: not YAML: .* indent with blanks"):
        read(tmp_path, "a:\n\tb: 1\n")
    path.write_bytes(b"\xef\xbb\xbfa:\r\n  b: 1\r\n")  # As Windows' editors save it.
    assert Document.read(path).values == {"a": {"b": 1}}


def test_brackets_are_counted_before_they_are_scanned(tmp_path):
    begin = time.perf_counter()
    with pytest.raises(CoRaError, match="nested too deep"):
        read(tmp_path, "a: " + "[" * 20_000)
    assert time.perf_counter() - begin < 2
    deep = "[" * (DEPTH - 1) + "]" * (DEPTH - 1)
    assert read(tmp_path, f"a: {deep}").values


@pytest.mark.parametrize("text", ["2020-99-99", "9" * 5000, "[" * 3000 + "]" * 3000])
def test_impossible_flags_are_no_values(text):
    with pytest.raises(ConfigError, match="is no YAML value"):
        parse_value(text)


@given(st.text(max_size=60) | st.text("&*[]{}:-!|>#'\" \n\tab0", max_size=60))
def test_any_text_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        assert isinstance(Document.read(path).values, dict)
    except CoRaError as error:
        assert str(error).startswith(str(path))
