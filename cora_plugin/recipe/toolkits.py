"""What a recipe asks of its toolkit, whose host is imported when it is read."""

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from cora_plugin.document import unknown
from cora_plugin.integrations.ptq import AbstractPTQ, host_package, options_of
from cora_plugin.recipe.schema import Recipe

Format = Callable[..., None]
"""Writes a model: `write(model, example, path, **options)`."""


def toolkit(recipe: Recipe) -> type[AbstractPTQ]:
    """The recipe's toolkit, once its options and formats are found to be right.

    Raises:
        CoRaError: An option or a format is unknown, or a value of the wrong type.
        ModuleNotFoundError: The toolkit is not installed.
    """
    document = recipe.document
    try:
        kind: type[AbstractPTQ] = host_package(recipe.toolkit).PTQ
    except ModuleNotFoundError as error:
        message = (
            f"toolkit: {recipe.toolkit} needs the package {error.name}, which is not "
            f'installed; pip install "cora-plugin[{recipe.toolkit}]"'
        )
        located = document.error(("toolkit",), message)
        raise ModuleNotFoundError(str(located), name=error.name) from error
    document.known(("ptq",), kind.hints)
    for name, value in recipe.ptq.items():
        document.typed(("ptq", name), value, kind.hints[name])
    writers = formats(recipe.toolkit)
    for index, export in enumerate(recipe.exports):
        key = ("exports", index, "format")
        if export.format not in writers:
            where = f"exports.{index}"
            raise document.error(key, unknown("format", export.format, writers, where))
        allowed = options_of(writers[export.format])
        for name, value in export.options.items():
            if name not in allowed:
                where = f"exports.{index}"
                names = ["format", "path", *allowed]
                raise document.error(
                    ("exports", index, name), unknown("key", name, names, where)
                )
            document.typed(("exports", index, name), value, allowed[name])
    return kind


def formats(name: str) -> dict[str, Format]:
    """A host's `export_…(model, example, path, …)`, and the adapters alone."""
    host = host_package(name)

    def adapters(model: nn.Module, example: Tensor, path: str) -> None:
        host.save_cora(path, model)

    found: dict[str, Format] = {"adapters": adapters}
    for public in host.__all__:
        if public.startswith("export_"):
            function = getattr(host, public)
            if "path" in " ".join(inspect.signature(function).parameters):
                found[public.removeprefix("export_")] = function
    return found
