"""What type checkers and editors know of settings is what settings are."""

import dataclasses
import typing

import pytest

from cora_plugin import CoRaConfig, CoRaSettings
from cora_plugin.config import ButterworthConfig, RefineConfig
from cora_plugin.config.given import ButterworthSettings, RefineSettings

PAIRS = (
    (CoRaConfig, CoRaSettings),
    (ButterworthConfig, ButterworthSettings),
    (RefineConfig, RefineSettings),
)

WAYS = {
    "budget": ("0.1 bits", 0.1),
    "term_bits": ([2, 3], 3, "2/3"),
    "bias_correction": ("off", False),
    "refine": ({"iterations": 3}, RefineConfig(iterations=3), 3),
    "sweep": ([0.1], 0.1, "0.1/0.2"),
    "butterworth": ({"order": 3}, ButterworthConfig()),
    "menu": ([4, 8], 4, "4/8", None),
    "objective": ("kl", len, {"boxes": "mse"}),
}
"""Settings that may be given in several ways, one value of each."""

BESIDE = {"menu": {"budget": "1 ptq"}}
"""What a setting is not without."""


def alternatives(hint):
    """The types that an annotation allows, of settings by the class itself."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return {("literal", value) for value in typing.get_args(hint)}
    parts = typing.get_args(hint)
    if str(origin) in ("typing.Union", "<class 'types.UnionType'>"):
        return set().union(*map(alternatives, parts))
    return {hint}


@pytest.mark.parametrize(("cls", "given"), PAIRS)
def test_they_have_the_same_names(cls, given):
    fields = [field.name for field in dataclasses.fields(cls)]
    assert fields == list(given.__annotations__)
    assert not given.__required_keys__


@pytest.mark.parametrize(("cls", "given"), PAIRS)
def test_what_a_setting_is_may_be_given(cls, given):
    own, known = typing.get_type_hints(cls), typing.get_type_hints(given)
    for name, hint in own.items():
        wanted = alternatives(hint)
        if typing.get_origin(hint) is tuple or name in ("menu", "objective"):
            continue  # A sequence of the same, or anything: read below.
        assert wanted <= alternatives(known[name]), name


@pytest.mark.parametrize("name", WAYS)
def test_all_that_may_be_given_is_read(name):
    for value in WAYS[name]:
        CoRaConfig(**{name: value}, **BESIDE.get(name, {}))


def test_every_setting_of_further_types_is_tried():
    own, known = (typing.get_type_hints(each) for each in PAIRS[0])
    wider = {n for n in own if alternatives(known[n]) != alternatives(own[n])}
    assert wider == set(WAYS)
