"""Ends a command as Ctrl-C does when the system asks it to end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGTERM", "SIGHUP")
"""From a scheduler, and from a terminal that was closed; Windows has only the first."""


class Ended(KeyboardInterrupt):
    """The process was asked to end.

    Args:
        signal: The number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Ended` where a signal would have killed the process without clean-up."""
    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        known = []  # Only the main thread may set handlers.
    # What was ignored on purpose, as nohup does, stays so.
    before = {n: signal.getsignal(n) for n in known}
    wanted = [n for n, handler in before.items() if handler is signal.SIG_DFL]
    for number in wanted:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in wanted:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise Ended(number)


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that an error is, or that it was made of.

    A module whose import was interrupted may say that it cannot be imported, and
    clean-up after an interrupt may fail itself.
    """
    each: BaseException | None = error
    while each is not None and not isinstance(each, KeyboardInterrupt):
        each = each.__cause__ or each.__context__
    return each
