"""Peers can be listed by name: each is one cell of a comparison that is measured."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from small_recipe import written

from cora_plugin.document import Document
from cora_plugin.grid.cells import cells
from cora_plugin.grid.section import CompareSection
from cora_plugin.integrations.toolkit import load_toolkit
from cora_plugin.recipe import Recipe, run

BREVITAS = ("ptq-mse", "gpfq", "qronos", "learned-round-layer", "learned-round-block")
METHODS = (
    "lorc",
    "qera-exact",
    "series",
    "8 bits",
    "bits",
    "bits and adapters",
    "two up",
)
CELLS = (
    *(("brevitas", recipe, "bias correction") for recipe in BREVITAS),
    *(("brevitas", "ptq", method) for method in METHODS),
    ("nncf", "smoothquant", "none"),
    ("nncf", "smoothquant", "default"),
    ("nncf", "ptq-mse", "bias correction"),
)


@pytest.mark.parametrize(("toolkit", "recipe", "method"), CELLS)
def test_a_peer_is_a_cell(toolkit, recipe, method, tmp_path):
    if find_spec(toolkit) is None:
        pytest.skip(f"needs {toolkit}")
    lists = {
        "recipes": recipe,
        "methods": method,
        "weight_bits": 3,
        "budgets": "1.1 ptq",
    }
    ptq = {"first_last_bits": 3}
    if "learned" in recipe:
        ptq |= {"learned_round_iters": 8, "learned_round_blocks": "^layers$"}
    path = written(tmp_path / "recipe.yaml", toolkit=toolkit, ptq=ptq, compare=lists)
    document = Document.read(path)
    section = CompareSection.read(document)
    (cell,) = cells(document, section, {toolkit: load_toolkit(toolkit)}, tmp_path)
    results = run(Recipe.of(Document("cell", dict(cell.values))))
    last = results.rows[-1]
    assert 0 < last.kl < 1
    allowed = {"bits": 1.1, "8 bits": 1.1, "bits and adapters": 1.1, "lorc": 1.1}
    if method in allowed:
        plain = results.rows[1].equivalent_bits or results.report.equivalent_bits_before
        assert last.equivalent_bits <= allowed[method] * plain + 0.01
    if method in ("bits", "8 bits"):
        assert not any(row.rank for row in results.report.layers)
        widths = {row.weight_bits for row in results.report.layers}
        assert widths <= ({3, 8} if method == "8 bits" else {3, 4, 5, 6, 8})
        assert len(widths) > 1


@pytest.mark.skipif(find_spec("brevitas") is None, reason="needs brevitas")
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("stage", "'stage' is found in no module's own name"),
        (
            r"^\d$",
            r"learned_round_blocks: .* is found in layers\.1, which holds no layer",
        ),
    ],
)
def test_blocks_that_there_are_not(blocks, message, tmp_path):
    from cora_plugin import CoRaError

    ptq = {"learned_round": "block", "learned_round_blocks": blocks}
    path = written(tmp_path / "recipe.yaml", ptq=ptq, cora=False)
    with pytest.raises(CoRaError, match=message):
        run(Recipe.read(path))


def test_every_name_is_in_the_table():
    docs = Path(__file__).parents[2] / "docs" / "compare.md"
    text = docs.read_text()
    for name in ("brevitas", "nncf"):
        if find_spec(name) is not None:
            for recipe in load_toolkit(name).recipes:
                assert f"`{recipe}`" in text
