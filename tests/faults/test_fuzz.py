"""Any settings and recipes are read, or refused with one line.

`--faults` says how many are tried.
"""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cora_plugin import CoRaConfig, CoRaError
from cora_plugin.config import ButterworthConfig, RefineConfig
from cora_plugin.config.declared import described
from cora_plugin.document import Document
from cora_plugin.recipe import Recipe

NAMES = sorted({".".join(key) for key, *_ in described(CoRaConfig)} | {"budgte"})
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["auto", "kl", "5%", "0.1 bits", "-1 params", "1e999", "", "é*[?"]
    )
    | st.text(max_size=4)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=2
        )
    ),
    max_leaves=5,
)
RECIPE = {
    "model": {"factory": "a:b", "args": {"x": 1}},
    "data": {
        "glob": "*.png",
        "images": 8,
        "seed": 0,
        "preprocessing": {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3},
    },
    "test": {"images": 4},
    "toolkit": "brevitas",
    "ptq": {"weight_bits": 4},
    "cora": {"budget": 0.1},
    "exports": ["adapters", {"format": "onnx_qcdq", "path": "a.onnx"}],
    "output": "out",
}


def paths(value, path=()):
    """The key of every value below one."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def read_or_refused(read, value):
    try:
        read(value)
    except CoRaError as error:
        assert str(error)


@pytest.fixture
def examples(faults):
    """How many examples hypothesis makes."""

    def many(test):
        quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        return settings(max_examples=faults(60), suppress_health_check=quiet)(test)

    return many


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("cls", [CoRaConfig, ButterworthConfig, RefineConfig])
def test_any_settings_are_read_or_refused(cls, examples):
    names = sorted({key[0] for key, *_ in described(cls)} | {"budgte"})

    @examples
    @given(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    def check(values):
        read_or_refused(lambda given: cls(**given), values)

    check()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_any_flag_text_is_read_or_refused(examples):
    part = st.tuples(
        st.sampled_from(NAMES), st.sampled_from(["=", ""]), st.text("0.e-[]{}a%,:")
    )

    @examples
    @given(st.lists(part.map("".join), max_size=3).map(",".join) | st.text(max_size=20))
    def check(text):
        read_or_refused(CoRaConfig.of, text)

    check()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_any_recipe_is_read_or_refused(examples):
    @examples
    @given(st.sampled_from([*paths(RECIPE)]), VALUES)
    def check(path, value):
        recipe = copy.deepcopy(RECIPE)
        *above, last = path
        into = recipe
        for step in above:
            into = into[step]
        into[last] = value
        read_or_refused(lambda given: Recipe.of(Document("", given)), recipe)

    check()
