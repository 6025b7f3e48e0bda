"""Where the demo finds weights and photos: the data files of installed packages."""

from importlib.util import find_spec
from pathlib import Path


def package_folder(name: str, extras: str = "demo") -> Path:
    """Folder of an installed top-level package, which is not imported.

    Args:
        name: The package.
        extras: Those of cora-plugin that bring it, for the error.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to
            install it.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the demo needs the package {name}, which is not installed; "
            f'pip install "cora-plugin[{extras}]"',
            name=name,
        )
    return Path(spec.submodule_search_locations[0])
