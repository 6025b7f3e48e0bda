"""Steps that improve adapters and biases beyond the closed form of one layer."""

from cora_plugin.fitting.alternation import alternate
from cora_plugin.fitting.bias import cascaded_shifts, own_shifts, rounding_shift
from cora_plugin.fitting.distillation import Distillation, Fitted
from cora_plugin.fitting.regression import LAST, Regression
from cora_plugin.fitting.walk import Walk

__all__ = [
    "LAST",
    "Distillation",
    "Fitted",
    "Regression",
    "Walk",
    "alternate",
    "cascaded_shifts",
    "own_shifts",
    "rounding_shift",
]
