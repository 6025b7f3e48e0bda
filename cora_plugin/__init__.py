"""Residual adapters for ConvNets quantized with Brevitas or NNCF."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cora_plugin.adapters import load_adapters, save_adapters
    from cora_plugin.adapters.errors import (
        BudgetError,
        ConfigError,
        CoRaError,
        DataError,
        FileError,
        ModelError,
        ToolkitError,
    )
    from cora_plugin.algorithm import CoRa
    from cora_plugin.config import Budget, CoRaConfig, CoRaSettings
    from cora_plugin.processes import alone
    from cora_plugin.report import Report

__all__ = [
    "Budget",
    "BudgetError",
    "CoRa",
    "CoRaConfig",
    "CoRaError",
    "CoRaSettings",
    "ConfigError",
    "DataError",
    "FileError",
    "ModelError",
    "Report",
    "ToolkitError",
    "alone",
    "load_adapters",
    "save_adapters",
]

_PLACES = {
    "Budget": "cora_plugin.config",
    "BudgetError": "cora_plugin.adapters.errors",
    "CoRa": "cora_plugin.algorithm",
    "CoRaConfig": "cora_plugin.config",
    "CoRaError": "cora_plugin.adapters.errors",
    "CoRaSettings": "cora_plugin.config",
    "ConfigError": "cora_plugin.adapters.errors",
    "DataError": "cora_plugin.adapters.errors",
    "FileError": "cora_plugin.adapters.errors",
    "ModelError": "cora_plugin.adapters.errors",
    "Report": "cora_plugin.report",
    "ToolkitError": "cora_plugin.adapters.errors",
    "alone": "cora_plugin.processes",
    "load_adapters": "cora_plugin.adapters",
    "save_adapters": "cora_plugin.adapters",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, imported when it is first asked for: torch takes seconds."""
    if name == "__version__":
        from importlib.metadata import version  # Not for every import of the package.

        return version("cora-plugin")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
