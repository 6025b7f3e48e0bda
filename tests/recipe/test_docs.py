"""Every key of a recipe is explained, and every ready recipe can be read."""

from dataclasses import fields
from pathlib import Path

import pytest

from cora_plugin.config import QATConfig
from cora_plugin.config.declared import described
from cora_plugin.recipe.schema import (
    DataSection,
    ModelSection,
    Preprocessing,
    Recipe,
)

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
DOCS = (RECIPES / "README.md").read_text()


@pytest.mark.parametrize("section", [DataSection, ModelSection, Preprocessing])
def test_every_key_is_explained(section):
    assert [f.name for f in fields(section) if f"`{f.name}`" not in DOCS] == []


def test_every_section_is_explained():
    headings = " ".join(line for line in DOCS.splitlines() if line.startswith("### "))
    names = [f.name for f in fields(Recipe) if f.name != "document"]
    assert [name for name in names if name not in headings] == []


@pytest.mark.parametrize("path", [*RECIPES.glob("*.yaml")], ids=lambda path: path.stem)
def test_every_ready_recipe_is_read_and_listed(path):
    assert Recipe.read(path).output != "cora-run"
    assert f"[`{path.name}`]({path.name})" in DOCS
    assert path.read_text().startswith("# ")  # It says what it is for.


def test_the_table_of_training_is_what_its_settings_say():
    for path, default, text in described(QATConfig):
        shown = "null" if default is None else default
        assert f"| `{'.'.join(path)}` | {shown} | {text} |" in DOCS, path
