"""`cora-plugin run`: quantize, repair, judge and export a model as YAML says.

>>> from cora_plugin.recipe import Recipe, run
>>> run(Recipe.read("recipe.yaml", ["data.images=24"]))
"""

from cora_plugin.recipe.first import document, first_recipe, write_first
from cora_plugin.recipe.run import check, run
from cora_plugin.recipe.schema import Recipe

__all__ = ["Recipe", "check", "document", "first_recipe", "run", "write_first"]
