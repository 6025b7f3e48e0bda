"""Reads what a loader yields as the arguments of a model."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import DataError
from cora_plugin.adapters.operation import first_nonfinite
from cora_plugin.batches import tensors
from cora_plugin.outputs import Batch, rebuilt

LABELS = ("label", "labels", "target", "targets")
"""Keys of a mapping that are no inputs, where the model does not take them."""

Reading = tuple[Callable[[Any], Any], str]
"""A way to read an item, and what it is called; "" where there is no other."""


class Reader:
    """Reads items, all as the first, which is tried: the first way that runs is taken.

    A tensor is the input, a mapping has keywords. Of a tuple the first element is the
    input, `(images, targets)`, unless the model takes more: then it is all of them.

    Args:
        run: Calls the model with a batch; None: the first way is taken.
        unpack: Turns an item into the arguments: a tensor, a tuple or a mapping.
    """

    def __init__(
        self,
        run: Callable[[Batch], Any] | None = None,
        unpack: Callable[[Any], Any] | None = None,
    ) -> None:
        self._run = run
        self._unpack = unpack
        self._way: Callable[[Any], Any] | None = None
        self._items = 0
        self.notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, run: Callable[[Batch], Any], unpack: "Callable[[Any], Any] | Reader | None"
    ) -> "Reader":
        """One that reads so, or the reader itself, which has begun to."""
        return unpack if isinstance(unpack, Reader) else cls(run, unpack)

    def again(self) -> "Reader":
        """One that reads the same items in the same way, from the first on."""
        other = Reader(self._run, self._unpack)
        other._way, other.notes = self._way, self.notes
        return other

    def __call__(self, item: Any) -> Batch:
        """The arguments in an item.

        Raises:
            DataError: There are none, the model does not run with them, or they hold
                NaN or inf.
        """
        index = self._items
        if self._unpack is not None:
            batch = self._unpack(item)
            _check(batch, item, index)
        else:
            if self._way is None:
                self._way = self._found(item)
            batch = self._way(item)
            _check(batch, item, index)
        self._items += 1
        read: Batch = _detached(batch)
        return read

    def _found(self, item: Any) -> Callable[[Any], Any]:
        ways = list(_ways(item))
        for way, _ in ways[:1]:
            _check(way(item), item, self._items)
        errors = []
        for way, name in ways:
            try:
                if self._run is not None:
                    with torch.no_grad():
                        self._run(_detached(way(item)))
            except Exception as error:
                errors.append(error)
                continue
            self.notes = (f"each item of the loader: {name}",) if name else ()
            return way
        raise not_running(self._items, item, errors[0]) from errors[0]


CALIBRATION = "calibration data"


def not_running(
    index: int, item: Any, error: Exception, what: str = CALIBRATION
) -> DataError:
    """What is said where the model does not run with an item."""
    way_out = "see that it is preprocessed as the model expects it"
    if what == CALIBRATION:
        way_out += ", or pass unpack=, a function from an item to the model's arguments"
    return DataError(
        f"{what}: the model does not run with item {index}, "
        f"{_describe(item)} ({type(error).__name__}: {error}); {way_out}"
    )


def check_loader(
    loader: Any, model: Any = None, walks: int = 1, what: str = CALIBRATION
) -> None:
    """Refuse what is no loader, before a model is touched.

    Args:
        loader: What was given for the data.
        model: What was given for the model; None: it is not looked at.
        walks: How often the data is walked.
        what: What the data is called.

    Raises:
        DataError: It is none, or stands in the model's place, or cannot be walked so
            often.
    """
    swapped = model is not None and not isinstance(model, nn.Module)
    if isinstance(loader, nn.Module):
        problem = f"is a {type(loader).__name__}, a model"
        if swapped:
            problem += "; model and data are in each other's place"
        raise DataError(f"{what}: {problem}; pass the loader in its place")
    if isinstance(loader, Tensor):
        raise DataError(
            f"{what}: is one tensor, {list(loader.shape)}, and not batches; "
            "pass a list such as images.split(16), or a DataLoader"
        )
    walked = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if isinstance(loader, Mapping | str | bytes) or not walked:
        raise DataError(
            f"{what}: a {type(loader).__name__} is no loader; pass a list of "
            "batches [N, …] or a DataLoader"
        )
    if walks > 1 and isinstance(loader, Iterator):
        raise DataError(
            f"{what}: a menu walks it twice, and an iterator can be walked "
            "once; pass a list or a DataLoader"
        )


def arguments(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    keywords: Mapping[str, Any],
    index: int = 0,
) -> Batch:
    """The batch that a call makes, the one at `index` of those so far.

    Raises:
        DataError: It has arguments of both kinds, and the function takes some of them
            by their place alone.
    """
    batch: Any
    if not keywords:
        batch = args[0] if len(args) == 1 else args
    elif not args:
        batch = dict(keywords)
    else:
        try:
            bound = inspect.signature(forward).bind(*args, **keywords)
        except (TypeError, ValueError) as error:
            raise DataError(f"calibration data: {error}") from error
        if bound.kwargs.keys() | bound.arguments.keys() != bound.arguments.keys():
            raise DataError(
                "calibration data: the model takes arguments by any name; pass all of "
                "a call's by name, or none"
            )
        batch = dict(bound.arguments)
    _check(batch, args[0] if len(args) == 1 else args or keywords, index)
    read: Batch = _detached(batch)
    return read


def _ways(item: Any) -> Iterator[Reading]:
    """How an item may be read, the likeliest first."""
    if isinstance(item, Mapping):
        yield dict, ""
        if any(key in LABELS for key in item):
            yield _without_labels, "keywords but for its labels"
        first = next((k for k, v in item.items() if isinstance(v, Tensor)), None)
        if first is not None:
            yield lambda each: each[first], f"{first!r} is the input"
    elif isinstance(item, tuple | list) and item:
        inner = item[0]
        if isinstance(inner, Tensor) and len(item) > 1:
            yield (lambda each: each[0]), _first_alone(item)
            for count in range(len(item), 1, -1):
                if all(isinstance(each, Tensor) for each in item[:count]):
                    said = f"the first {count} are the model's arguments"
                    yield partial(_leading, count), said
            yield (lambda each: (list(each),)), "a list, the model's one argument"
            return
        if isinstance(inner, tuple | list | Mapping):
            for way, name in _ways(inner):
                yield partial(_within, way), name or "the first element"
            if isinstance(inner, tuple | list):
                yield (lambda each: tuple(each[0])), "the first has the arguments"
            return
        yield (lambda each: each[0]), ""
    else:
        yield (lambda each: each), ""


def _leading(count: int, item: Any) -> Any:
    return tuple(item[:count])


def _within(way: Callable[[Any], Any], item: Any) -> Any:
    return way(item[0])


def _first_alone(item: Any) -> str:
    """What is said where the first element is the input; "" where that is clear."""
    if any(e.is_floating_point() and e.ndim > 1 for e in tensors(list(item[1:]))):
        return "the first is the input, the rest is not; unpack= says otherwise"
    return ""


def _without_labels(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in LABELS}


def _check(batch: Any, item: Any, index: int) -> None:
    found = list(tensors(batch))
    if not any(each.ndim >= 1 + each.is_floating_point() for each in found):
        raise DataError(
            f"calibration data: item {index} is {_describe(item)}; the loader should "
            "yield batches of images [N, …], alone or first in a tuple such as "
            "(images, targets), or whatever else the model takes"
        )
    if all(each.numel() == 0 for each in found):
        raise DataError(
            f"calibration data: item {index} is {_describe(item)}, without a single "
            "image; leave such batches out"
        )
    for each in found:
        problem = first_nonfinite(each) if each.is_floating_point() else None
        if problem is not None:
            raise DataError(
                f"calibration data: item {index} holds {problem}; clean the images or "
                "the preprocessing"
            )


def _detached(batch: Any) -> Any:
    """A batch without gradients; arguments in a list are those in a tuple."""
    plain = tuple(batch) if isinstance(batch, list | tuple) else batch
    return _mapped(plain)


def _mapped(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _mapped(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return rebuilt(value, map(_mapped, value))
    return value


def _describe(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {list(item.shape)} and {item.dtype}"
    if isinstance(item, list | tuple):
        parts = ", ".join(type(part).__name__ for part in item)
        return f"a {type(item).__name__} of ({parts})"
    return f"a {type(item).__name__}"
