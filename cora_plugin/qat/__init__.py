"""Training of quantized models by the rate at which weights change their codes."""

from cora_plugin.qat.groups import param_groups
from cora_plugin.qat.hosted import hosted
from cora_plugin.qat.record import LayerRecord, StepRecord, Transitional
from cora_plugin.qat.scheduler import TransitionRateScheduler

__all__ = [
    "LayerRecord",
    "StepRecord",
    "TransitionRateScheduler",
    "Transitional",
    "hosted",
    "param_groups",
]
