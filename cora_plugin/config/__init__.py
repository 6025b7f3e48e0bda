"""Settings: `CoRaConfig`, the budget, the learning steps, and how all are declared."""

from cora_plugin.config.budget import Budget
from cora_plugin.config.cora import CORRECTIONS, METRICS, SEARCHES, CoRaConfig
from cora_plugin.config.given import AnyConfig, CoRaSettings
from cora_plugin.config.learning import ButterworthConfig, RefineConfig
from cora_plugin.config.qat import QATConfig

__all__ = [
    "CORRECTIONS",
    "METRICS",
    "SEARCHES",
    "AnyConfig",
    "Budget",
    "ButterworthConfig",
    "CoRaConfig",
    "CoRaSettings",
    "QATConfig",
    "RefineConfig",
]
