"""Residual adapters for ConvNets quantized with Brevitas or NNCF."""

from cora_plugin.adapters import load_adapters, save_adapters
from cora_plugin.adapters.errors import (
    BudgetError,
    ConfigError,
    CoRaError,
    DataError,
    FileError,
    ModelError,
)
from cora_plugin.algorithm import CoRa
from cora_plugin.config import Budget, CoRaConfig
from cora_plugin.report import Report

__all__ = [
    "Budget",
    "BudgetError",
    "CoRa",
    "CoRaConfig",
    "CoRaError",
    "ConfigError",
    "DataError",
    "FileError",
    "ModelError",
    "Report",
    "load_adapters",
    "save_adapters",
]
