"""Runs a model on any batch, and names the tensors that it returns."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import ModelError

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""One tensor, positional arguments, or keyword arguments of a model."""

Outputs = Mapping[str, Tensor]
"""A model's output tensors by name, each [N, …]; a lone one is named ""."""


def run(
    model: nn.Module, batch: Batch, unpack: Callable[[Any], Any] = lambda value: value
) -> dict[str, Tensor]:
    """Call a model on its own device, in its own dtype, and name its outputs.

    Args:
        model: The model.
        batch: Its arguments; tensors of integers keep their dtype.
        unpack: Turns an output of the toolkit's own type into a tensor.

    Raises:
        ModelError: The model returns no tensor.
    """
    arguments = suited(model, batch)
    if isinstance(arguments, Tensor):
        answer = model(arguments)
    elif isinstance(arguments, Mapping):
        answer = model(**arguments)
    else:
        answer = model(*arguments)
    return named(answer, unpack)


def suited(model: nn.Module, batch: Any) -> Any:
    """A model's arguments on its device, with floats of its dtype if it has any."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return moved(batch, device_of(model), None if like is None else like.dtype)


def moved(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A model's arguments on another device.

    Args:
        batch: Tensors, in tuples, lists and mappings.
        device: Where they go.
        dtype: What tensors of floats become; None leaves them.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {key: moved(item, device, dtype) for key, item in batch.items()}
    if isinstance(batch, tuple | list):
        return rebuilt(batch, (moved(item, device, dtype) for item in batch))
    return batch


def rebuilt(like: Any, items: Iterable[Any]) -> Any:
    """A tuple, named tuple or list of the same type, of other items."""
    if hasattr(like, "_fields"):
        return type(like)(*items)
    return type(like)(items)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model, by its first parameter; one without runs on the CPU."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def in_batches(
    model: nn.Module,
    images: Tensor,
    size: int = 32,
    unpack: Callable[[Any], Any] = lambda value: value,
) -> Tensor:
    """Outputs of a model [N, …], run batch by batch on its device.

    Only a batch at a time is there; outputs are on the device of the images.
    """
    device = device_of(model)
    parts = [
        unpack(model(batch.to(device))).to(images.device)
        for batch in images.split(size)
    ]
    return torch.cat(parts)


def named(
    answer: Any, unpack: Callable[[Any], Any] = lambda value: value
) -> dict[str, Tensor]:
    """The tensors in whatever a forward returns, by name.

    A lone tensor, or a tuple of one, is named ""; elements of a tuple have their index
    for a name, those of a mapping or a dataclass their key, and nested ones both, as in
    `boxes.0`.

    Raises:
        ModelError: There is no tensor in it.
    """
    found = dict(_leaves(answer, unpack, ()))
    if not found:
        raise ModelError(
            f"the model's output is {type(answer).__name__}, without a tensor in it; "
            "wrap the model so that its forward returns tensors"
        )
    return found


def only(outputs: Outputs) -> Tensor:
    """The output of a model that has one.

    Raises:
        ModelError: It has several.
    """
    if len(outputs) != 1:
        raise ModelError(
            f"the model's output is {len(outputs)} tensors ({', '.join(outputs)}), not "
            "logits [N, classes, …]; wrap the model so that its forward returns one "
            "tensor"
        )
    return next(iter(outputs.values()))


def joined(parts: Sequence[Outputs]) -> dict[str, Tensor]:
    """Outputs of several batches as those of one."""
    if len(parts) == 1:
        return dict(parts[0])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def rows(outputs: Outputs, index: Sequence[int]) -> dict[str, Tensor]:
    """Some samples of outputs, by their index."""
    return {name: value[list(index)] for name, value in outputs.items()}


def _leaves(answer: Any, unpack: Callable[[Any], Any], path: tuple[str, ...]) -> Any:
    value = unpack(answer)
    if isinstance(value, Tensor):
        yield ".".join(path), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, unpack, (*path, str(key)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            yield from _leaves(item, unpack, (*path, field.name))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            inner = path if len(value) == 1 else (*path, str(index))
            yield from _leaves(item, unpack, inner)
