"""Changes to a torch model for the length of a block, undone however it ends."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

Flag = tuple[nn.Module, str, bool]
"""A module, an attribute of its own, and what that is set to."""


@contextmanager
def replaced(holder: object, method: str, function: Any) -> Iterator[None]:
    """Replace a method, or another attribute, of one module or object."""
    own = vars(holder)
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


def flags_within(scope: AbstractContextManager[Any], model: nn.Module) -> list[Flag]:
    """What a scope of a toolkit changes of the modules' own booleans.

    To enter such a scope may take as long as a batch, for many walk through the model
    once for each of its modules; `flagged` then does the same at once.
    """
    before = _flags(model)
    with scope:
        within = _flags(model)
    return [
        (module, name, value)
        for (module, name), value in within.items()
        if before[module, name] != value
    ]


def _flags(model: nn.Module) -> dict[tuple[nn.Module, str], bool]:
    return {
        (module, name): value
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, bool)
    }


@contextmanager
def flagged(flags: Sequence[Flag]) -> Iterator[None]:
    """Set booleans of modules."""
    before = [(module, name, vars(module)[name]) for module, name, _ in flags]
    try:
        for module, name, value in flags:
            vars(module)[name] = value
        yield
    finally:
        for module, name, value in before:
            vars(module)[name] = value
