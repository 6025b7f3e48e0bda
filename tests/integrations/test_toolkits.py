"""What the toolkits say of their options and formats is what their functions take."""

import inspect
from dataclasses import fields
from importlib.util import find_spec

import pytest

from cora_plugin import CoRaError
from cora_plugin.integrations.toolkit import ADAPTERS, declared, load_toolkit

INSTALLED = [name for name in ("brevitas", "nncf") if find_spec(name)]

BY_CALL = {"check", "dynamic_axes", "input_names", "output_names"}
"""Arguments of exporters that recipes do not give."""


@pytest.fixture(params=INSTALLED)
def toolkit(request):
    return load_toolkit(request.param)


def defaults(function):
    """Arguments that have a default, and whether others go on to torch's exporter."""
    parameters = inspect.signature(function).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    return found, any(p.kind is p.VAR_KEYWORD for p in parameters)


def test_every_option_is_explained(toolkit):
    assert [f.name for f in fields(toolkit.options) if not f.metadata["help"]] == []


def test_the_options_of_formats_are_those_of_their_exporters(toolkit):
    for name, export in toolkit.exports.items():
        given = {f.name: f.default for f in fields(export.options)}
        found, others = defaults(export.write)
        own = {each: default for each, default in given.items() if each in found}
        assert {each: found[each] for each in own} == own, name
        assert given.keys() - own.keys() <= (BY_CALL if others else set()), name
        assert found.keys() - given.keys() <= BY_CALL, name


def test_every_recipe_names_options(toolkit):
    options = [toolkit.options(**values) for values in toolkit.recipes.values()]
    assert options[0] == toolkit.options()
    assert len({*map(repr, options)}) == len(options)


def test_every_toolkit_writes_adapters_and_what_onnxruntime_runs(toolkit):
    assert toolkit.exports[ADAPTERS].suffix == ".safetensors"
    name, export = toolkit.onnxruntime_format()
    assert "int8 ONNX" in export.forms and toolkit.exports[name] is export
    assert {"weight_bits", "layer_bits"} <= declared(toolkit.options).keys()


@pytest.mark.skipif("brevitas" not in INSTALLED, reason="needs brevitas")
def test_two_ways_to_round_are_refused():
    with pytest.raises(CoRaError, match="gptq, gpfq, qronos and learned_round"):
        load_toolkit("brevitas").options(gptq=True, qronos=True)
