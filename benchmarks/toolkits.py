"""The toolkits' models that the benchmarks compare."""

import argparse
import contextlib
import copy
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from data import Task
from torch import Tensor, nn
from zoo import MODELS

from cora_plugin import Report
from cora_plugin.adapters.files import whole_file
from cora_plugin.integrations.ptq import AbstractPTQ, host_package
from cora_plugin.layer import Host

METHODS: dict[str, dict[str, Any]] = {
    "svd uniform": {"search": "uniform", "metric": "svd"},
    "qera-exact uniform": {"search": "uniform", "metric": "qera-exact"},
    "butterworth": {"search": "butterworth", "metric": "svd"},
    "qera-exact spectral": {"metric": "qera-exact"},
    "default": {},
    "8-bit adapters": {"adapter_bits": 8},
}
"""Ways to choose adapters, by name; "none" is the toolkit alone."""

RAISED = "8 bits"
"""No adapters: for as many bits as those of "default", the layers whose residual costs
most of the loss at 8 bits."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Variant:
    """A quantized model and how it came about; seconds are those of all its steps."""

    recipe: str
    method: str
    budget: str
    model: nn.Module
    equivalent_bits: float
    seconds: float


RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "brevitas": {
        "ptq": {},
        "gptq": {"gptq": True},
        "gpfq": {"gpfq": True},
        "qronos": {"qronos": True},
    },
    "nncf": {
        "ptq": {},
        "ptq-histogram": {"act_range": "histogram"},
        "ptq-minmax": {"act_range": "minmax"},
        "ptq-unclipped": {"weight_quantile": None},
    },
}
"""Ways to quantize by toolkit: options of its PTQ, beside the bit widths. NNCF clips
weights at their 0.3 % quantile if nothing else is said."""


def network_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which network is quantized, and how: see `ptq`."""
    parser.add_argument("--model", choices=sorted(MODELS), default="lite0")
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--depthwise-bits", type=int, help="default: as the others")
    parser.add_argument("--act-range", help="how the toolkit finds activation ranges")
    parser.add_argument("--equalize-iters", type=int, help="Brevitas only")


def run_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a benchmark that works on one network in one toolkit."""
    network_flags(parser)
    parser.add_argument("--toolkit", choices=sorted(RECIPES), default="brevitas")
    parser.add_argument("--json", type=Path, help="write what was measured here, too")


def write_json(path: Path | None, measured: Any) -> None:
    """Write what was measured to where `--json` says, if it does."""
    if path is not None:
        with whole_file(path) as temporary:
            Path(temporary).write_text(json.dumps(measured, indent=2))


def ptq(name: str, task: Task, options: Any, **more: Any) -> AbstractPTQ:
    """A toolkit's PTQ of a task's network, as `network_flags` and `more` have it."""
    kind: type[AbstractPTQ] = host_package(name).PTQ
    given = {"depthwise_bits": options.depthwise_bits}
    for flag in ("weight_bits", "act_bits", "act_range", "equalize_iters"):
        value = getattr(options, flag)
        if value is not None:
            given[flag] = value
    return kind(task.net, task.loader(), **given, **more)


def host_of(name: str, model: nn.Module, example: Tensor) -> Host:
    """A quantized model as the algorithm sees it."""
    package: Any = host_package(name)
    if name == "nncf":
        return package.NNCFHost(model, example)
    return package.BrevitasHost(model)


def variants(name: str, task: Task, options: Any, recipe: str) -> Iterator[Variant]:
    """The model after one of `RECIPES`, without adapters and with each method's.

    `RAISED` models go through the whole recipe. Brevitas' bias correction, "+bc", is
    run on each of them. NNCF's is on models without adapters; behind adapters the
    plugin corrects biases.
    """
    toolkit = ptq(name, task, options, **RECIPES[name][recipe])
    brevitas = name == "brevitas"
    base, seconds = timed(toolkit.quantize)
    before, rows = float("nan"), []
    for budget in options.budgets:
        for method in options.methods:
            if method == RAISED:
                continue
            model = copy.deepcopy(base)
            config = {"budget": budget, **METHODS[method]}
            if brevitas:
                config["bias_correction"] = "off"
            report, spent = timed(toolkit.adapt, model, config)
            before = report.equivalent_bits_before
            bits = report.equivalent_bits
            rows.append((method, budget, model, bits, spent, toolkit))
            if method == "default" and RAISED in options.methods:
                names, bits = raised(host_of(name, base, task.test[:1]), report)
                finer = RECIPES[name][recipe] | {"layer_bits": dict.fromkeys(names, 8)}
                tool = ptq(name, task, options, **finer)
                model, spent = timed(tool.quantize)
                rows.append((RAISED, budget, model, bits, spent, tool))
    rows.insert(0, ("none", "", base, before, seconds, toolkit))
    for method, budget, model, bits, spent, tool in rows:
        if brevitas or method in ("none", RAISED):
            yield Variant(recipe, method, budget, model, bits, spent)
            model, more = timed(tool.corrected, model)
            spent = spent + more if brevitas else more  # NNCF quantizes anew.
        yield Variant(f"{recipe}+bc", method, budget, model, bits, spent)


@torch.no_grad()
def raised(host: Host, report: Report) -> tuple[list[str], float]:
    """Layers to have at 8 bits in place of adapters, and the equivalent bits then.

    Layers are taken by error in the loss (as `spectral` measures it) a bit, while they
    fit in what the adapters of the report take.
    """
    layers = {layer.name: layer for layer in host.layers}
    weights = sum(layer.weight.numel() for layer in layers.values())
    left = (report.equivalent_bits - report.equivalent_bits_before) * weights
    prices = {
        name: (8 - layer.weight_bits) * layer.weight.numel()
        for name, layer in layers.items()
        if layer.weight_bits < 8
    }
    errors = {row.name: row.error_before for row in report.layers}
    chosen, spent = [], 0.0
    for name in sorted(prices, key=lambda n: errors[n] / prices[n], reverse=True):
        if prices[name] <= left - spent:
            spent += prices[name]
            chosen.append(name)
    return chosen, report.equivalent_bits_before + spent / weights


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
