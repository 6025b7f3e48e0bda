"""Training of quantized models by the rate at which weights change their codes."""

from cora_plugin.config import QATConfig
from cora_plugin.qat.finetune import finetune
from cora_plugin.qat.groups import param_groups
from cora_plugin.qat.hosted import hosted
from cora_plugin.qat.record import LayerRecord, StepRecord, Transitional
from cora_plugin.qat.report import QATReport
from cora_plugin.qat.scheduler import TransitionRateScheduler

__all__ = [
    "LayerRecord",
    "QATConfig",
    "QATReport",
    "StepRecord",
    "TransitionRateScheduler",
    "Transitional",
    "finetune",
    "hosted",
    "param_groups",
]
