"""Residual adapters: how they are solved, run and stored. Needs torch alone."""

from cora_plugin.adapters.adapter import Adapter, Term
from cora_plugin.adapters.branch import Branch
from cora_plugin.adapters.expansion import Series, SeriesProduct, expand
from cora_plugin.adapters.factor import Root, metric_root, truncate
from cora_plugin.adapters.factors import Factors, make_adapter
from cora_plugin.adapters.form import Cost, Form, Kind
from cora_plugin.adapters.operation import Operation
from cora_plugin.adapters.parallel import AbelianSum, isomorphic
from cora_plugin.adapters.quantized import QuantizedTensor, quantize
from cora_plugin.adapters.storage import load_adapters, save_adapters

__all__ = [
    "AbelianSum",
    "Adapter",
    "Branch",
    "Cost",
    "Factors",
    "Form",
    "Kind",
    "Operation",
    "QuantizedTensor",
    "Root",
    "Series",
    "SeriesProduct",
    "Term",
    "expand",
    "isomorphic",
    "load_adapters",
    "make_adapter",
    "metric_root",
    "quantize",
    "save_adapters",
    "truncate",
]
