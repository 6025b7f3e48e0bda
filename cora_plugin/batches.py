"""Batches of whatever a model takes: their rows, joined, and told apart.

A batch is a tensor, positional arguments or keyword arguments. Its rows are those of
its first tensor; tensors with as many rows go along, everything else belongs to the
whole batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cora_plugin.outputs import Batch, rebuilt


def tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors(item)
    elif isinstance(batch, tuple | list):
        for item in batch:
            yield from tensors(item)


def samples(batch: Batch) -> int:
    """The number of rows of a batch; 1 where its first tensor has no axes."""
    first = next(tensors(batch))
    return len(first) if first.ndim else 1


def pick(batch: Batch, rows: Sequence[int]) -> Batch:
    """Some rows of a batch, copied."""
    count, index = samples(batch), list(rows)

    def some(value: Tensor) -> Tensor:
        return value[index] if value.ndim and len(value) == count else value.clone()

    picked: Batch = _mapped(some, batch)
    return picked


def copied(batch: Batch) -> Batch:
    """A batch that does not change when the loader uses its memory again."""
    whole: Batch = _mapped(Tensor.clone, batch)
    return whole


def signature(batch: Batch) -> Any:
    """What batches must have in common to be joined: all but the number of rows."""
    count = samples(batch)

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            own = bool(value.ndim) and len(value) == count
            return own, tuple(value.shape[own:]), value.dtype
        if isinstance(value, Mapping):
            return tuple((name, of(item)) for name, item in value.items())
        if isinstance(value, tuple | list):
            return tuple(of(item) for item in value)
        return repr(value)

    return of(batch)


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of one signature as one."""
    counts = [samples(batch) for batch in batches]

    def together(parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            own = [p.ndim and len(p) == n for p, n in zip(parts, counts, strict=True)]
            return torch.cat(list(parts)) if all(own) else first
        if isinstance(first, Mapping):
            return {name: together([p[name] for p in parts]) for name in first}
        if isinstance(first, tuple | list):
            return rebuilt(first, map(together, zip(*parts, strict=True)))
        return first

    whole: Batch = together(batches)
    return whole


class Units(Sequence[Batch]):
    """Pieces of data, each the least that a model can run: a row, or a whole batch.

    Args:
        units: The pieces.
        join: Whether pieces of one signature may run together.
        size: Most rows that run together.
    """

    def __init__(
        self, units: Sequence[Batch], join: bool = True, size: int = 1
    ) -> None:
        self._units = list(units)
        self._join = join
        self.size = size

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Units(self._units[index], self._join, self.size)
        return self._units[index]

    @property
    def rows(self) -> int:
        """Rows of all pieces."""
        return sum(map(samples, self._units))

    def groups(
        self, index: Sequence[int] | None = None, size: int | None = None
    ) -> list[list[int]]:
        """Pieces that run together, by index, in their order.

        Args:
            index: Some pieces; None: all.
            size: Most rows that run together; None: as the loader had them.
        """
        most = size or self.size
        found: list[list[int]] = []
        open_groups: dict[Any, list[int]] = {}
        for number in range(len(self)) if index is None else index:
            unit = self._units[number]
            kind = signature(unit)
            group = open_groups.get(kind)
            held = sum(samples(self._units[n]) for n in group or ())
            if group is None or not self._join or held + samples(unit) > most:
                group = open_groups[kind] = []
                found.append(group)
            group.append(number)
        return found

    def batch(self, group: Sequence[int]) -> Batch:
        """The pieces of a group as one batch."""
        return joined([self._units[number] for number in group])

    def batches(self, index: Sequence[int] | None = None) -> list[Batch]:
        """Pieces in the batches that they run in."""
        return [self.batch(group) for group in self.groups(index)]


def _mapped(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: _mapped(change, item) for name, item in batch.items()}
    if isinstance(batch, tuple | list):
        return rebuilt(batch, (_mapped(change, item) for item in batch))
    return batch
