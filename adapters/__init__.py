"""Residual adapters: how they are solved, run and stored. Needs torch alone."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_PLACES = {
    "AbelianSum": "cora_plugin.adapters.parallel",
    "Adapter": "cora_plugin.adapters.adapter",
    "Branch": "cora_plugin.adapters.branch",
    "Cost": "cora_plugin.adapters.form",
    "Factors": "cora_plugin.adapters.factors",
    "Form": "cora_plugin.adapters.form",
    "Kind": "cora_plugin.adapters.form",
    "Operation": "cora_plugin.adapters.operation",
    "QuantizedTensor": "cora_plugin.adapters.quantized",
    "Root": "cora_plugin.adapters.factor",
    "Series": "cora_plugin.adapters.expansion",
    "SeriesProduct": "cora_plugin.adapters.expansion",
    "Term": "cora_plugin.adapters.adapter",
    "expand": "cora_plugin.adapters.expansion",
    "isomorphic": "cora_plugin.adapters.parallel",
    "load_adapters": "cora_plugin.adapters.storage",
    "make_adapter": "cora_plugin.adapters.factors",
    "metric_root": "cora_plugin.adapters.factor",
    "quantize": "cora_plugin.adapters.quantized",
    "save_adapters": "cora_plugin.adapters.storage",
    "truncate": "cora_plugin.adapters.factor",
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, imported when it is first asked for: torch takes seconds."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
