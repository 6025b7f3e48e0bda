"""What a residual adapter is: closed forms, branches and storage; torch only."""

from cora_plugin.adapters.adapter import Adapter, Factors, Kind, make_adapter
from cora_plugin.adapters.branch import Branch
from cora_plugin.adapters.factor import Root, metric_root, truncate
from cora_plugin.adapters.operation import Operation
from cora_plugin.adapters.quantized import QuantizedTensor, quantize
from cora_plugin.adapters.storage import load_adapters, save_adapters

__all__ = [
    "Adapter",
    "Branch",
    "Factors",
    "Kind",
    "Operation",
    "QuantizedTensor",
    "Root",
    "load_adapters",
    "make_adapter",
    "metric_root",
    "quantize",
    "save_adapters",
    "truncate",
]
