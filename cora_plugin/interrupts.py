"""Ends a command at once where it is asked to end, whatever it is doing."""

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, from a scheduler, and from a terminal that was closed; Windows lacks the
last."""


MOMENT = 0.01
"""Seconds until a lost interrupt is raised again."""


class Ended(KeyboardInterrupt):
    """The process was asked to end.

    Args:
        signal: The number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class Interrupts:
    """The interrupts of a block; `first` is the first that came, None before.

    An interrupt may come while C code calls Python, an extension is imported, or an
    object is finalized: then another error arrives, without a trace of it, or none.
    """

    def __init__(self) -> None:
        self.first: Ended | None = None

    def end(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal.

        Raises:
            Ended: Always.
        """
        ended = Ended(number)
        self.first = self.first or ended
        raise ended


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Raise `Ended` where a signal comes, so that there is time to clean up.

    One that is lost, for Python ignores errors of finalizers and some callbacks, is
    raised again.
    """
    interrupts = Interrupts()
    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        known = []  # Only the main thread may set handlers.
    # What was ignored on purpose, as nohup does, stays so, and so do others' handlers.
    before = {n: signal.getsignal(n) for n in known}
    usual = (signal.SIG_DFL, signal.default_int_handler)
    wanted = {n: handler for n, handler in before.items() if handler in usual}
    hook = sys.unraisablehook
    timers: list[threading.Timer] = []

    def again(lost: Any) -> None:
        if not (wanted and isinstance(lost.exc_value, Ended)):
            hook(lost)
            return
        # A moment later, or it would be raised in here and be lost again.
        number = signal.Signals(lost.exc_value.signal)
        timers.append(threading.Timer(MOMENT, _thread.interrupt_main, [number]))
        timers[-1].start()

    sys.unraisablehook = again
    for number in wanted:
        signal.signal(number, interrupts.end)
    try:
        yield interrupts
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in wanted.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that an error is, or that it was made of.

    A module whose import was interrupted may say that it cannot be imported, and
    clean-up after an interrupt may fail itself.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if isinstance(each, KeyboardInterrupt):
            return each
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            waiting += [each.__context__, each.__cause__]
    return None
