"""The models of a comparison: a task in a toolkit, with adapters and without."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from cora_plugin.budget import stored_bits
from cora_plugin.compare.rows import NONE
from cora_plugin.compare.task import Task
from cora_plugin.host import Host
from cora_plugin.integrations.toolkit import Options, Quantized, Toolkit
from cora_plugin.progress import timed
from cora_plugin.report import Report

RAISED = "8 bits"
"""The method without adapters that spends an arm's bits on raising layers to 8 bits,
those whose residual costs most of the loss."""


@dataclass(frozen=True)
class Arm:
    """One way to add adapters: what it is called, and its settings.

    `budget` is what its row says of the budget. After an arm with `raised` comes one
    without adapters, `RAISED`, for as many bits.
    """

    method: str
    config: Any
    budget: str = ""
    raised: bool = False


@dataclass(frozen=True)
class Variant:
    """A quantized model and how it came about; seconds are those of all its steps."""

    recipe: str
    method: str
    budget: str
    quantized: Quantized[Any]
    equivalent_bits: float
    seconds: float
    report: Report | None = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.quantized.model

    @property
    def about(self) -> Mapping[str, Any]:
        """The fields of its `Row` that describe it."""
        names = ("recipe", "method", "budget", "equivalent_bits", "seconds")
        return {name: getattr(self, name) for name in names}


def variants(
    toolkit: Toolkit[Any],
    task: Task,
    options: Options,
    arms: Sequence[Arm],
    recipe: str = "ptq",
    correct_adapted: bool = False,
    console: Console | None = None,
) -> Iterator[Variant]:
    """Yield a task's quantized network, without adapters and with those of each arm.

    A model without adapters comes twice: as it is and, as `recipe`+bc, after the
    toolkit's bias correction. Adapters correct biases themselves, so models with them
    are called +bc, too.

    Args:
        toolkit: The toolkit.
        task: The network and its images.
        options: How to quantize it.
        arms: The adapters to add, each to a copy.
        recipe: What `options` are called.
        correct_adapted: Run the toolkit's bias correction behind adapters, too. It
            needs `Toolkit.corrects_afterwards`.
        console: Where progress goes; None: nowhere.
    """
    title = f"{toolkit.title} W{options.weight_bits}A{options.act_bits}"
    net, loader = task.net, task.loader()
    base, seconds = timed(console, title, toolkit.quantize, net, loader, options)
    layers = toolkit.host(base.model, task.test[:1]).layers
    weights = sum(layer.weight.numel() for layer in layers)
    before = stored_bits(layers, ()) / weights
    plain = Variant(recipe, NONE, "", base, before, seconds)
    yield plain
    yield _named(_corrected(toolkit, plain, console))
    for arm in arms:
        what = f"{toolkit.title}, adapters: {arm.method}"
        (quantized, report), spent = timed(
            console, what, toolkit.adapted, base.copied(), arm.config
        )
        bits = report.equivalent_bits
        found = (recipe, arm.method, arm.budget, quantized, bits, spent, report)
        adapted = Variant(*found)
        if correct_adapted:
            yield adapted
            adapted = _corrected(toolkit, adapted, console)
        yield _named(adapted)
        if arm.raised:
            host = toolkit.host(base.model, task.test[:1])
            names, bits = raised(host, report)
            finer = replace(options, layer_bits=dict.fromkeys(names, 8))
            what = f"{title}, {len(names)} layers at 8 bits"
            quantized, spent = timed(
                console, what, toolkit.quantize, net, loader, finer
            )
            peer = Variant(recipe, RAISED, arm.budget, quantized, bits, spent)
            yield peer
            yield _named(_corrected(toolkit, peer, console))


def _named(variant: Variant) -> Variant:
    """A variant whose biases are corrected."""
    return replace(variant, recipe=f"{variant.recipe}+bc")


def _corrected(
    toolkit: Toolkit[Any], variant: Variant, console: Console | None
) -> Variant:
    what = f"{toolkit.title}, its bias correction"
    corrected, spent = timed(console, what, toolkit.correct_biases, variant.quantized)
    if toolkit.corrects_afterwards:  # Else the model was quantized anew.
        spent += variant.seconds
    return replace(variant, quantized=corrected, seconds=spent)


@torch.no_grad()
def raised(host: Host, report: Report) -> tuple[list[str], float]:
    """Layers to raise to 8 bits in place of adapters, and the bits a weight then.

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
