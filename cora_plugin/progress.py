"""Progress of long work: bars, spinners and timings in place of what toolkits print.

In a terminal each loop is a bar of tqdm with an estimate of what is left; within
`quiet`, which hides what is printed, the spinner's line tells the same. Where neither
is a terminal, `timed` writes one line when the work is done.
"""

import contextlib
import io
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TextIO, TypeVar

from rich.console import Console
from rich.status import Status
from rich.text import Text
from tqdm import tqdm

Item = TypeVar("Item")

_sink: TextIO | None = None
"""Where what toolkits print goes; None: nowhere."""

_turning: tuple[Status, str] | None = None
"""The spinner of a terminal, and what is being done; None: there is none."""


def bar(
    items: Iterable[Item],
    what: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    brief: bool = False,
) -> "tqdm[Item]":
    """Show how far the walk through some items is.

    Args:
        items: What to walk through.
        what: What it is called.
        unit: What an item is called.
        total: How many there are in all, where the items do not say.
        initial: How many were done before.
        brief: Whether the bar goes when it is done.
    """
    return _Bar(items, what, unit, total, initial, brief)


def counter(what: str, unit: str, total: int, initial: int = 0) -> "tqdm[Any]":
    """Show how far work is that calls `update`; arguments as for `bar`."""
    return _Bar(None, what, unit, total, initial, False)


class _Bar(tqdm):  # type: ignore[type-arg]  # It takes none as the program runs.
    """tqdm, whose line stands behind the spinner where one turns."""

    def __init__(
        self,
        items: Iterable[Any] | None,
        what: str,
        unit: str,
        total: int | None,
        initial: int,
        brief: bool,
    ) -> None:
        self._spinner = _turning
        # A spinner has the terminal; else a bar is for a terminal alone.
        place: Any = {"disable": None}
        if os.environ.get("RANK", "0") != "0":  # One of several processes is enough.
            place = {"disable": True}
        elif self._spinner is not None:
            place = {"file": io.StringIO()}
        super().__init__(
            items,
            desc=what,
            unit=unit,
            total=total,
            initial=initial,
            leave=not brief,
            **place,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Show how far it is."""
        if self._spinner is None:
            return super().display(msg, pos)
        if msg is None:  # It is not the one that clears the line.
            spinner, what = self._spinner
            spinner.update(Text(f"{what}: {self._line()}"))
        return None

    def _line(self) -> str:
        """What is done, and how long the rest will take."""
        numbers = self.format_dict
        done, total, rate = (numbers[key] for key in ("n", "total", "rate"))
        if rate is None and numbers["elapsed"]:
            rate = (done - numbers["initial"]) / numbers["elapsed"]
        line = f"{self.desc.removesuffix(': ')} {done}"
        line += f"/{total}" if total else f" {self.unit}"
        if total and rate:
            left = self.format_interval(max(total - done, 0) / rate)
            line += f", about {left} left"
        return f"{line}, {self.postfix}" if self.postfix else line


@contextlib.contextmanager
def told(sink: TextIO | None) -> Iterator[None]:
    """Within it, what `quiet` would hide goes to a stream, logs of INFO included.

    Args:
        sink: The stream; None: hide it.
    """
    global _sink
    before, root = _sink, logging.getLogger()
    _sink, level = sink, root.level
    handler = logging.StreamHandler(sink)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    if sink is not None:
        root.addHandler(handler)
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        _sink = before
        root.removeHandler(handler)
        root.setLevel(level)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextlib.contextmanager
def quiet(console: Console | None = None, what: str = "") -> Iterator[None]:
    """Show a spinner with `what`; hide prints, progress bars, warnings and logs.

    Args:
        console: Where the spinner is shown; give it a file of its own,
            `Console(file=sys.stdout)`, or it is hidden, too. None: no spinner.
        what: What is being done.
    """
    with (
        _spinner(console, what),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(_sink or io.StringIO()),
        contextlib.redirect_stderr(_sink or io.StringIO()),
    ):
        if _sink is None:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _spinner(console: Console | None, what: str) -> Iterator[None]:
    """Turn a spinner; bars within it write behind it."""
    global _turning
    if console is None or not console.is_terminal or console.quiet:
        yield
        return
    before = _turning
    with console.status(Text(what)) as status:
        _turning = status, what
        try:
            yield
        finally:
            _turning = before


def timed(
    console: Console | None,
    what: str,
    work: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> tuple[Result, float]:
    """Do some work quietly; return what it returns, and its seconds.

    The console, if there is one, shows what is done and then how long it took.
    """
    start = time.perf_counter()
    with quiet(console, what):
        result = work(*args, **kwargs)
    seconds = time.perf_counter() - start
    if console is not None:
        console.print(f"{what}: {seconds:.0f} s", highlight=False, markup=False)
    return result, seconds
