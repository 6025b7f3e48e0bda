"""Streamed statistics: moments of layers' inputs, sensitivities of their outputs.

Memory beyond the model is O(Σ k²): activations are reduced where they appear.
"""

from cora_plugin.statistics.collector import Collector
from cora_plugin.statistics.metrics import LayerStatistics, weighting
from cora_plugin.statistics.moments import InputMoments
from cora_plugin.statistics.sensitivity import OutputSensitivity, collect_sensitivities

__all__ = [
    "Collector",
    "InputMoments",
    "LayerStatistics",
    "OutputSensitivity",
    "collect_sensitivities",
    "weighting",
]
