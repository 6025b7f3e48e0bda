"""The settings, one module each for the budget, for what learns, and for the whole."""

from cora_plugin.config.budget import Budget
from cora_plugin.config.cora import CORRECTIONS, METRICS, SEARCHES, CoRaConfig
from cora_plugin.config.learning import ButterworthConfig, FitConfig

__all__ = [
    "CORRECTIONS",
    "METRICS",
    "SEARCHES",
    "Budget",
    "ButterworthConfig",
    "CoRaConfig",
    "FitConfig",
]
