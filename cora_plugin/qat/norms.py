"""Batch norms of a model in training: as they are, or measured anew at the end."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cora_plugin import processes

BATCHES = 50
"""Batches that statistics are measured anew on."""


def norms_of(model: nn.Module) -> list[Any]:
    """The batch norms of a model that keep statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]


def train_mode(model: nn.Module, frozen: bool) -> None:
    """Put a model in training mode, its batch norms in evaluation mode if `frozen`."""
    model.train()
    if frozen:
        for norm in norms_of(model):
            norm.eval()


@torch.no_grad()
def measure(model: nn.Module, run: Callable[[Any], Any], batches: Iterable[Any]) -> int:
    """Measure the statistics of batch norms anew; return how many norms there are.

    The model ends in evaluation mode. Of several processes each sees its own batches,
    and as many as the others.

    Args:
        model: The model.
        run: Runs it on images.
        batches: Images; the first `BATCHES` of them are used.
    """
    norms = norms_of(model)
    model.eval()
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # The mean of all batches, not a running one.
        norm.train()
    for images in islice(batches, BATCHES):
        run(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    average(model)
    model.eval()
    return len(norms)


@torch.no_grad()
def average(model: nn.Module) -> None:
    """Have the statistics be the mean of those of all processes."""
    if processes.count() == 1:
        return
    norms = norms_of(model)
    held = [value for norm in norms for value in (norm.running_mean, norm.running_var)]
    processes.add_up("statistics of norms", held)
    for value in held:
        value.div_(processes.count())
