"""What the searches and refinements that learn by gradient have in common."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
"""A parameter group as torch's optimizers take it."""


def shuffled(images: int, size: int, iterations: int, seed: int) -> list[list[int]]:
    """Which images each iteration sees: all in turn, shuffled anew every round.

    Args:
        images: Number of images.
        size: Images an iteration, at most all.
        iterations: Number of iterations; more of them begin as fewer do.
        seed: Seeds the order.
    """
    size = min(size, images)
    random = torch.Generator().manual_seed(seed)
    rounds = -(-iterations * size // images)
    order = [torch.randperm(images, generator=random) for _ in range(rounds)]
    shown = torch.cat(order)[: iterations * size]
    batches: list[list[int]] = shown.view(-1, size).tolist()
    return batches


def relative_groups(parameters: Iterable[Tensor], lr: float) -> list[Group]:
    """Learning rates for an Adam, relative to the size of what they change.

    Adam moves every entry by about its learning rate, so a rate times the root mean
    square moves tensors of any scale by the same share. Those of zeros are left out.
    """
    return [
        {"params": [parameter], "lr": lr * size}
        for parameter in parameters
        if (size := float(parameter.detach().square().mean().sqrt()))
    ]
