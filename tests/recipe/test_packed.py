"""A menu of bit widths has what a recipe's files can store."""

from types import SimpleNamespace

import pytest

from cora_plugin.config import CoRaConfig
from cora_plugin.integrations.toolkit import PACKED, Export
from cora_plugin.recipe.packed import as_packed
from cora_plugin.recipe.schema import Export as Wanted
from cora_plugin.recipe.toolkits import Chosen

FORMATS = {
    "packed": Export(print, ".onnx", packs=lambda options: PACKED),
    "any": Export(print, ".qonnx"),
    "some": Export(print, ".onnx", packs=lambda options: options.get("at", ())),
}


def menu(asked, *exports):
    """The menu of a recipe with these exports, and what is said."""
    wanted = tuple(Wanted(format=name, path=name, options=o) for name, o in exports)
    chosen = Chosen(SimpleNamespace(exports=FORMATS), None, wanted)
    config, line = as_packed(CoRaConfig.of({"budget": "1 ptq", "menu": asked}), chosen)
    return config.widths, line


@pytest.mark.parametrize(
    ("asked", "exports", "expected"),
    [
        ((3, 4, 5, 6, 8), [("packed", {})], (4, 8)),
        ((3, 5), [("packed", {}), ("any", {})], (4, 8)),
        ((2, 4), [("some", {"at": (2, 4, 8)}), ("packed", {})], (4,)),
        ((3, 4, 5), [("any", {}), ("some", {})], (3, 4, 5)),
        ((3, 4, 5), [], (3, 4, 5)),
        ((4, 8), [("packed", {})], (4, 8)),
    ],
)
def test_widths_are_those_that_files_store(asked, exports, expected):
    found, line = menu(asked, *exports)
    assert found == expected
    assert (line is None) == (expected == asked)


def test_it_is_said():
    _, line = menu((3, 4, 8), ("packed", {}))
    assert line == (
        "menu: packed stores weights of 4 and 8 bits, and 3 as 4, which is nearer to "
        "float at the same size: planned from 4/8"
    )
    config = CoRaConfig.of(0.05)
    chosen = Chosen(SimpleNamespace(exports=FORMATS), None, ())
    assert as_packed(config, chosen) == (config, None)
