"""Several processes that give one model its adapters, each with its share of the data.

They are those of torch's process group, which `torchrun` and `accelerate launch` set
up. What a pass over the data sums is added up over them at its end, by gloo or NCCL
alike; all decide by the same numbers and end with the same adapters.

Before anything is sent, the processes tell each other where they are, so that one that
failed, or that does something else, is an error in all of them and not a wait.
"""

import logging
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 20.0
"""Seconds after which a process says what it waits for; it waits on, for others may
have more to do."""

ROOM = 8
"""Numbers that are sent along with where a process is, in one exchange."""

_alone = ContextVar("alone", default=False)
_agreeing = ContextVar("agreeing", default=False)


class ApartError(CoRaError):
    """The processes are no longer together; all of them know, or are gone."""


@contextmanager
def alone() -> Iterator[None]:
    """Within it a process works by itself, though there is a process group.

    >>> if torch.distributed.get_rank() == 0:
    ...     with cora_plugin.alone():
    ...         apply_cora(loader, model)
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def count() -> int:
    """The number of processes that work together; 1 without a process group."""
    there = dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist.get_world_size() if there else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if count() > 1 else 0


def mine(things: Sequence[T]) -> Sequence[T]:
    """This process's share of things that all have: every `count`-th from its rank."""
    return things if count() == 1 else things[rank() :: count()]


def add_up(
    what: str, tensors: Sequence[Tensor] = (), numbers: Sequence[float] = ()
) -> list[float]:
    """Add up tensors, in place, and numbers, which are returned, over all processes.

    Args:
        what: What they are; all processes must be there at the same time.
        tensors: Of the same shapes in all of them.
        numbers: As many in all of them.

    Raises:
        ApartError: Another process has failed, is gone, or does something else.
    """
    if count() == 1:
        return list(numbers)
    apart = [*numbers[ROOM:]]
    counted = torch.tensor(apart, dtype=torch.float64)
    shapes = [tuple(each.shape) for each in (*tensors, counted)]
    found = _meet(what, shapes, numbers[:ROOM])
    with _reached(what):
        for each in [*tensors, *([counted] if apart else [])]:
            with _sent(each) as there:
                dist.all_reduce(there)
    return [*found, *counted.tolist()]


def gathered(what: str, thing: T) -> list[T]:
    """What all processes have, by rank; tensors in it should be on the CPU.

    Args:
        what: As for `add_up`.
        thing: What this one has.

    Raises:
        ApartError: As for `add_up`.
    """
    if count() == 1:
        return [thing]
    _meet(what, [])
    found: list[Any] = [None] * count()
    with _reached(what):
        dist.all_gather_object(found, thing)
    return found


def of_first(what: str, thing: T | None) -> T:
    """What the first process has; what the others have is not sent.

    Args:
        what: As for `add_up`.
        thing: What this one has; tensors in it should be on the CPU.

    Raises:
        ApartError: As for `add_up`.
    """
    found: Any = gathered(what, None if rank() else thing)
    return found[0]  # type: ignore[no-any-return]


def from_first(what: str, tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of the first process, in place.

    They should be the same up to rounding on unlike machines; now they are the same.

    Args:
        what: As for `add_up`.
        tensors: Likewise.

    Raises:
        ApartError: As for `add_up`.
    """
    if count() == 1:
        return
    _meet(what, [tuple(each.shape) for each in tensors])
    with _reached(what):
        for each in tensors:
            with _sent(each) as there:
                dist.broadcast(there, 0)


@contextmanager
def agreeing() -> Iterator[None]:
    """If the block fails in one process, it does so in all, before the block is left.

    Raises:
        ApartError: It failed in another process.
    """
    if count() == 1 or _agreeing.get():
        yield
        return
    token = _agreeing.set(True)
    try:
        yield
        _meet("the end", [])
    except ApartError:
        raise
    except Exception as error:
        try:
            _meet(f"{type(error).__name__}: {error}", [], failed=True)
        except ApartError:
            pass  # This one's own error says more.
        raise
    finally:
        _agreeing.reset(token)


def _meet(
    what: str,
    shapes: Sequence[tuple[int, ...]],
    numbers: Sequence[float] = (),
    failed: bool = False,
) -> list[float]:
    """Wait until all processes are at the same place; add up a few numbers there.

    What is sent is of the same size wherever a process is, or they could not tell.

    Raises:
        ApartError: One of them has failed, is gone, or is elsewhere.
    """
    # Of so few bits that sums of squares are exact.
    place = zlib.crc32(repr((what, shapes, len(numbers))).encode()) % 2**20
    head = torch.zeros(3 + ROOM, dtype=torch.float64)
    sent = [float(failed), place, place**2, *numbers]
    head[: len(sent)] = torch.tensor(sent, dtype=torch.float64)
    waiting = threading.Timer(
        PATIENCE,
        log.warning,
        (
            "process %d waits for the others at %r: all of them must call it, or one "
            "within `with cora_plugin.alone():`",
            rank(),
            what,
        ),
    )
    waiting.daemon = True
    waiting.start()
    try:
        with _reached(what), _sent(head) as there:
            dist.all_reduce(there)
    finally:
        waiting.cancel()
    anyone, places, squares, *found = head.tolist()
    if anyone:
        raise ApartError("processes: another one has failed, and says why itself")
    # They are all the same if their mean is this one, and their variance is 0.
    if places != count() * place or squares != count() * place**2:
        raise ApartError(
            f"processes: number {rank()} is at {what!r} and another is elsewhere, or "
            "has it in other shapes; each needs the same quantized model and settings, "
            "and a share of the data with at least one batch"
        )
    return found[: len(numbers)]


@contextmanager
def _reached(what: str) -> Iterator[None]:
    """Say what it means where the process group fails."""
    try:
        yield
    except RuntimeError as error:
        raise ApartError(
            f"processes: {what}: the others are gone or do not answer ({error}); all "
            "of them must call it, or one within `with cora_plugin.alone():`"
        ) from error


@contextmanager
def _sent(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor where the process group takes it, written back if that is elsewhere."""
    device = tensor.device
    if device.type == "cpu" and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    there = tensor.detach().to(device).contiguous()
    yield there
    if there.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(there)
