"""Models inside torch's wrappers for several devices, and names that tell of them."""

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")

PREFIX = "module."
"""What these wrappers put in front of every name."""


def bare(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel` or `DistributedDataParallel`; any other itself.

    Adapters are its own: with the wrapper they would have other names in files.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        model = inner
    return model


def by_own_names(values: Mapping[str, T], layers: Collection[str]) -> dict[str, T]:
    """What a file holds by layer name, by the names that a model's layers have.

    A file may have been written for the wrapped model, and loaded into the bare one, or
    the other way round.

    Args:
        values: By the names in the file.
        layers: The names in the model.
    """
    return {_own_name(name, layers): value for name, value in values.items()}


def _own_name(name: str, layers: Collection[str]) -> str:
    without = name.removeprefix(PREFIX)
    for other in (name, without, f"{PREFIX}{name}"):
        if other in layers:
            return other
    return name
