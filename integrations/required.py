"""Checks for packages that only exports need."""

import importlib

from cora_plugin.adapters.errors import CoRaError


def require(purpose: str, *packages: str) -> None:
    """Check that packages can be imported.

    Raises:
        CoRaError: One cannot; the message says how to install it.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise CoRaError(
                f"{purpose} needs {package}, which cannot be imported ({error}); "
                f"install it: pip install {package}"
            ) from error
