"""Changes to a torch model for the length of a block, undone however it ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(
    module: nn.Module, method: str, function: Callable[..., Any]
) -> Iterator[None]:
    """Replace a method of one module."""
    own = vars(module)
    before = own.get(method)
    own[method] = function
    try:
        yield
    finally:
        if before is None:
            own.pop(method, None)
        else:
            own[method] = before


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Switch off the gradients of all parameters."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
