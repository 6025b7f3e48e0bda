"""Gradient descent, shared by the search and the refinement that learn."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.progress import bar

Group = dict[str, Any]
"""A parameter group as torch's optimizers take it."""


def shuffled(images: int, size: int, iterations: int, seed: int) -> list[list[int]]:
    """The images of each iteration, by index: all in turn, reshuffled every round.

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
    taken = torch.cat(order)[: iterations * size]
    batches: list[list[int]] = taken.view(-1, size).tolist()
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


def descend(
    name: str,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Sequence[int]],
    learn: Callable[[Sequence[int]], Mapping[str, float]],
    after: Callable[[int, dict[str, str]], bool],
    way_out: str,
    start: int = 0,
) -> int:
    """Minimize a loss batch by batch with a progress bar; return the iterations done.

    Args:
        name: Its name in the progress bar and in errors.
        optimizer: Moves the parameters.
        batches: Indices of the images of each iteration.
        learn: Computes the gradients of a batch; returns figures for the progress bar,
            `loss` first. In several processes both are a share that is added up.
        after: Called after each iteration with its number and the progress bar's
            figures, to which it may add; returns whether to stop.
        way_out: Settings that the error says to lower.
        start: Iterations that were done before.

    Raises:
        CoRaError: The loss or a gradient is no longer finite; nothing has moved.
    """
    progress = bar(batches[start:], name, "iteration", len(batches), start)
    done = start
    with progress:
        for number, batch in enumerate(progress, start + 1):
            optimizer.zero_grad()
            figures = _together(name, optimizer, learn(batch))
            _check(name, optimizer, figures, number, way_out)
            optimizer.step()
            done = number
            postfix = {key: f"{value:.4g}" for key, value in figures.items()}
            stop = after(number, postfix)
            progress.set_postfix(postfix)
            if stop:
                break
    return done


def averaged(each: Sequence[Tensor]) -> Tensor:
    """This process's share of the mean over the samples of all, of [N] a group."""
    (samples,) = processes.add_up("samples", (), [sum(map(len, each))])
    return torch.cat(list(each)).sum() / samples if each else torch.tensor(0.0)


def _together(
    name: str, optimizer: torch.optim.Optimizer, figures: Mapping[str, float]
) -> Mapping[str, float]:
    """Add gradients up over all processes; the figures of all."""
    if processes.count() == 1:
        return figures
    total = add_gradients_up(name, optimizer, list(figures.values()))
    return dict(zip(figures, total, strict=True))


@torch.no_grad()
def add_gradients_up(
    name: str,
    optimizer: torch.optim.Optimizer,
    numbers: Sequence[float] = (),
    weight: float = 1.0,
) -> list[float]:
    """Add an optimizer's gradients up over all processes, in place, at one exchange.

    A parameter without a gradient in all of them is left without one, for optimizers
    pass it over; else it counts as 0.

    Args:
        name: What is trained.
        optimizer: Holds the parameters.
        numbers: Added up, too, and returned.
        weight: What this process's gradients are multiplied by first.
    """
    if processes.count() == 1:
        return list(numbers)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    with_one = [parameter.grad is not None for parameter in held]
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in held
    ]
    flags = torch.tensor(with_one, dtype=parts[0].dtype, device=parts[0].device)
    flat = torch.cat([*(part * weight for part in parts), flags])
    total = processes.add_up(f"{name}: gradients", [flat], numbers)
    *sums, flags = flat.split([*(p.numel() for p in held), len(held)])
    for parameter, value, anyone in zip(held, sums, flags.tolist(), strict=True):
        if anyone:
            parameter.grad = value.view_as(parameter).to(parameter.dtype)
    return total


def _check(
    name: str,
    optimizer: torch.optim.Optimizer,
    figures: Mapping[str, float],
    number: int,
    way_out: str,
) -> None:
    slopes = [p.grad for group in optimizer.param_groups for p in group["params"]]
    largest = [float(slope.abs().max()) for slope in slopes if slope is not None]
    if all(map(math.isfinite, (figures["loss"], *largest))):
        return
    loss, *others = (f"{key} {value:.4g}" for key, value in figures.items())
    seen = f" ({', '.join(others)})" if others else ""
    loss = loss.replace("loss", "the loss is")
    raise CoRaError(
        f"{name}: {loss} at iteration {number}{seen} and cannot be followed; lower "
        f"{way_out}"
    )
