"""The entry points of hosts, found without importing any, nor torch."""

from importlib.metadata import EntryPoint, entry_points

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.typed import unknown

GROUP = "cora_plugin.hosts"
"""The entry points of hosts: name = the place of a `Toolkit` object."""

OURS = "cora-plugin"
"""This package; each of its toolkits is an extra of the same name."""


def toolkits() -> list[str]:
    """Names of the installed hosts, this package's first.

    A name says that the host is there; its toolkit may still be absent.
    """
    points = entry_points(group=GROUP)
    found = {point.name: not _is_ours(point) for point in points}
    return sorted(found, key=lambda name: (found[name], name))


def install_line(name: str, *extras: str) -> str:
    """The command that installs a toolkit, and extras of this package beside it."""
    point = entry_point(name)
    if _is_ours(point):
        return f'pip install "{OURS}[{",".join([*extras, name])}]"'
    package = point.dist.name if point.dist is not None else name
    beside = f'"{OURS}[{",".join(extras)}]" ' if extras else ""
    return f"pip install {beside}{package}"


def entry_point(name: str) -> EntryPoint:
    """The entry point of a host.

    Raises:
        ConfigError: There is none of this name.
    """
    for point in entry_points(group=GROUP, name=name):
        return point
    raise ConfigError((), unknown("toolkit", name, toolkits()))


def _is_ours(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == OURS
