"""The toolkits' models that the benchmarks compare."""

import contextlib
import copy
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from data import Task
from torch import Tensor, nn

from cora_plugin.integrations.ptq import AbstractPTQ, host_package
from cora_plugin.layer import Host

METHODS: dict[str, dict[str, str]] = {
    "svd uniform": {"search": "uniform", "metric": "svd"},
    "qera-exact uniform": {"search": "uniform", "metric": "qera-exact"},
    "butterworth": {"search": "butterworth", "metric": "svd"},
    "spectral": {"search": "spectral", "metric": "qera-exact"},
}
"""Ways to choose adapters, by name; "none" is the toolkit alone."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Variant:
    """A quantized model and how it came about; seconds are those of all its steps."""

    recipe: str
    method: str
    model: nn.Module
    equivalent_bits: float
    seconds: float


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "brevitas": {"ptq": {}, "gptq": {"gptq": True}},
    "nncf": {
        "ptq": {},
        "ptq-histogram": {"act_range": "histogram"},
        "ptq-minmax": {"act_range": "minmax"},
        "ptq-unclipped": {"weight_quantile": None},
    },
}
"""Ways to quantize by toolkit: options of its PTQ, beside the bit widths. NNCF clips
weights at their 0.3 % quantile if nothing else is said."""


def ptq(name: str, task: Task, options: Any, **more: Any) -> AbstractPTQ:
    """A toolkit's PTQ of a task's network, as the command line has it."""
    kind: type[AbstractPTQ] = host_package(name).PTQ
    flags = ("weight_bits", "act_bits", "depthwise_bits", "equalize_iters")
    given = {flag: getattr(options, flag) for flag in flags if flag in kind.hints}
    return kind(task.net, task.loader(), **given, **more)


def host_of(name: str, model: nn.Module, example: Tensor) -> Host:
    """A quantized model as the algorithm sees it."""
    package: Any = host_package(name)
    if name == "nncf":
        return package.NNCFHost(model, example)
    return package.BrevitasHost(model)


def variants(name: str, task: Task, options: Any, recipe: str) -> Iterator[Variant]:
    """The model after one of `RECIPES`, without adapters and with each method's.

    Brevitas' bias correction, "+bc", is run on each of them. NNCF's is on the model
    without adapters; behind adapters the plugin corrects biases.
    """
    toolkit = ptq(name, task, options, **RECIPES[name][recipe])
    brevitas = name == "brevitas"
    base, seconds = timed(toolkit.quantize)
    before, rows = float("nan"), []
    for method in options.methods:
        model = copy.deepcopy(base)
        config = {"budget": options.budget, **METHODS[method]}
        if brevitas:
            config["bias_correction"] = "off"
        report, spent = timed(toolkit.adapt, model, config)
        before = report.equivalent_bits_before
        rows.append((method, model, report.equivalent_bits, spent))
    for method, model, bits, spent in [("none", base, before, seconds), *rows]:
        if brevitas or method == "none":
            yield Variant(recipe, method, model, bits, spent)
            model, more = timed(toolkit.corrected, model)
            spent = spent + more if brevitas else more  # NNCF quantizes anew.
        yield Variant(f"{recipe}+bc", method, model, bits, spent)


def timed(
    work: Callable[..., Result], *args: Any, **kwargs: Any
) -> tuple[Result, float]:
    """Do some work without a sound; return its result and its seconds."""
    with quiet():
        start = time.perf_counter()
        result = work(*args, **kwargs)
        return result, time.perf_counter() - start


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the toolkits' progress bars and warnings out of the tables."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
