"""From ranks to adapters and biases, beyond the closed form of a single layer."""

from cora_plugin.fitting.alternation import alternate
from cora_plugin.fitting.bias import cascaded_shifts, own_shifts
from cora_plugin.fitting.distillation import Distillation
from cora_plugin.fitting.regression import regress
from cora_plugin.fitting.walk import Walk

__all__ = [
    "Distillation",
    "Walk",
    "alternate",
    "cascaded_shifts",
    "own_shifts",
    "regress",
]
