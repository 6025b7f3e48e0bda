"""Loads a recipe's toolkit, and checks its options and export formats."""

from dataclasses import dataclass, replace
from typing import Any

from cora_plugin.adapters.errors import ConfigError, CoRaError, Key
from cora_plugin.integrations.toolkit import Options, Toolkit, declared, load_toolkit
from cora_plugin.recipe.folder import conflict
from cora_plugin.recipe.schema import Export, Recipe
from cora_plugin.typed import unknown


@dataclass(frozen=True)
class Chosen:
    """A recipe's toolkit, the options of its PTQ, and the files that it writes."""

    toolkit: Toolkit[Any]
    options: Options
    exports: tuple[Export, ...]


def chosen(recipe: Recipe) -> Chosen:
    """Load the recipe's toolkit, and check its options and formats.

    Raises:
        ConfigError: An option or a format is unknown, or a value of the wrong type.
        ModuleNotFoundError: The toolkit is not installed.
    """
    try:
        toolkit = load_toolkit(recipe.toolkit)
    except ModuleNotFoundError as error:
        located = recipe.document.error(("toolkit",), str(error))
        raise ModuleNotFoundError(str(located), name=error.name) from error
    return Chosen(toolkit, _options(recipe, toolkit), _exports(recipe, toolkit))


def _options(recipe: Recipe, toolkit: Toolkit[Any]) -> Options:
    document, hints = recipe.document, declared(toolkit.options)
    document.known(("ptq",), hints)
    for name, value in recipe.ptq.items():
        document.typed(("ptq", name), value, hints[name])
    try:
        options: Options = toolkit.options(**recipe.ptq)
    except ConfigError as error:
        raise document.located(error, ("ptq",)) from error
    except CoRaError as error:
        raise document.error(("ptq",), str(error)) from error
    return options


def _exports(recipe: Recipe, toolkit: Toolkit[Any]) -> tuple[Export, ...]:
    """The exports with the paths that the recipe leaves to the toolkit."""
    document, formats = recipe.document, toolkit.exports
    found: list[Export] = []
    for index, export in enumerate(recipe.exports):
        key: Key = ("exports", index)
        if export.format not in formats:
            problem = unknown("format", export.format, formats)
            raise document.error(key, problem, at=(*key, "format"))
        hints = declared(formats[export.format].options)
        for name, value in export.options.items():
            if name not in hints:
                problem = unknown("key", name, ["format", "path", *hints])
                raise document.error(key, problem, at=(*key, name))
            document.typed((*key, name), value, hints[name])
        try:
            formats[export.format].options(**export.options)
        except ConfigError as error:
            raise document.located(error, key) from error
        path = export.path or export.format + formats[export.format].suffix
        problem_found = conflict(path, [each.path for each in found])
        if problem_found is not None:
            raise document.error((*key, "path"), problem_found, at=key)
        found.append(replace(export, path=path))
    return tuple(found)
