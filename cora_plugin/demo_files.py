"""Where the demo finds weights and photos: the data files of installed packages."""

from importlib.util import find_spec
from pathlib import Path


def package_folder(name: str) -> Path:
    """Folder of an installed top-level package, which is not imported.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to
            install it.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the demo needs the package {name}, which is not installed; "
            'pip install "cora-plugin[demo]"',
            name=name,
        )
    return Path(spec.submodule_search_locations[0])
