"""Menus of bit widths as a recipe's files can store them."""

from dataclasses import replace

from cora_plugin.config import CoRaConfig
from cora_plugin.recipe.toolkits import Chosen


def as_packed(config: CoRaConfig, chosen: Chosen) -> tuple[CoRaConfig, str | None]:
    """A config whose menu has what the files pack, and a line that says so.

    A weight of 5 bits that a file stores in a byte costs what one of 8 bits costs, and
    is further from the float weight: the wider one takes its place.

    Args:
        config: The recipe's.
        chosen: Its toolkit and exports.

    Returns:
        The config as it is and None where every width of the menu can be stored.
    """
    formats = chosen.toolkit.exports
    packs = {e.path: formats[e.format].packs(e.options) for e in chosen.exports}
    files = [path for path, widths in packs.items() if widths]
    if not files:
        return config, None
    # A width that one file blows up is no gain in the others.
    held = sorted(set.intersection(*({*packs[path]} for path in files)))
    stored = {
        width: min((wider for wider in held if wider >= width), default=width)
        for width in config.widths
    }
    blown = {width: wider for width, wider in stored.items() if wider != width}
    if not blown:
        return config, None
    line = ", ".join(f"{width} as {wider}" for width, wider in blown.items())
    menu = tuple(sorted({*stored.values()}))
    return replace(config, menu=menu), (
        f"menu: {', '.join(files)} stores weights of {' and '.join(map(str, held))} "
        f"bits, and {line}, which is nearer to float at the same size: planned from "
        f"{'/'.join(map(str, menu))}"
    )
