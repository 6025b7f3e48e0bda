"""CoRa for Brevitas: after calibration (and GPTQ and the like), before bias correction.

>>> from cora_plugin.integrations.brevitas import apply_cora
>>> report = apply_cora(calib_loader, quant_model, "budget=0.05")
"""

from cora_plugin.integrations.brevitas.algorithm import (
    CoRaTransform,
    apply_cora,
    cora_mode,
    expand_weights,
    load_cora,
    plan_bits,
    remove_cora,
    save_cora,
)
from cora_plugin.integrations.brevitas.export import (
    export_onnx_qcdq,
    export_qonnx,
    export_torch_qcdq,
)
from cora_plugin.integrations.brevitas.host import BrevitasHost
from cora_plugin.integrations.brevitas.layers import snapshot
from cora_plugin.integrations.brevitas.recipe import quantize_ptq

__all__ = [
    "BrevitasHost",
    "CoRaTransform",
    "apply_cora",
    "cora_mode",
    "expand_weights",
    "export_onnx_qcdq",
    "export_qonnx",
    "export_torch_qcdq",
    "load_cora",
    "plan_bits",
    "quantize_ptq",
    "remove_cora",
    "save_cora",
    "snapshot",
]
