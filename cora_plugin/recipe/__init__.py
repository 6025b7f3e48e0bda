"""`cora-plugin run`: quantize, repair, judge and export a model as YAML says.

>>> from cora_plugin.recipe import Recipe, run
>>> run(Recipe.read("recipe.yaml", ["data.images=24"]))
"""

from cora_plugin.recipe.first import document, first_recipe, write_first
from cora_plugin.recipe.run import check, check_names, run
from cora_plugin.recipe.schema import Recipe

__all__ = [
    "Recipe",
    "check",
    "check_names",
    "document",
    "first_recipe",
    "run",
    "write_first",
]
