"""CoRa for NNCF's PyTorch backend, inside `nncf.quantize` or after it.

>>> from cora_plugin.integrations.nncf import CoRaQuantizationParameters
>>> quantized = nncf.quantize(
...     model,
...     dataset,
...     advanced_parameters=CoRaQuantizationParameters(cora="budget=0.05"),
... )
>>> print(quantized.cora_report)
"""

from cora_plugin.integrations.nncf.algorithm import (
    CoRaAlgorithm,
    apply_cora,
    expand_weights,
    load_cora,
    plan_bits,
    remove_cora,
    save_cora,
)
from cora_plugin.integrations.nncf.bits import allow_bits
from cora_plugin.integrations.nncf.export import (
    export_onnx,
    export_openvino,
    export_program,
    exportable,
)
from cora_plugin.integrations.nncf.host import NNCFHost
from cora_plugin.integrations.nncf.layer_bits import LayerBits
from cora_plugin.integrations.nncf.recipe import quantize_ptq
from cora_plugin.integrations.nncf.register import (
    CoRaPipeline,
    CoRaQuantizationParameters,
    register,
    unregister,
)

__all__ = [
    "CoRaAlgorithm",
    "CoRaPipeline",
    "CoRaQuantizationParameters",
    "LayerBits",
    "NNCFHost",
    "allow_bits",
    "apply_cora",
    "expand_weights",
    "export_onnx",
    "export_openvino",
    "export_program",
    "exportable",
    "load_cora",
    "plan_bits",
    "quantize_ptq",
    "register",
    "remove_cora",
    "save_cora",
    "unregister",
]
