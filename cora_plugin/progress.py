"""Spinners and timings in place of what toolkits print meanwhile."""

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TextIO, TypeVar

from rich.console import Console

_sink: TextIO | None = None
"""Where what toolkits print goes; None: nowhere."""


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
        contextlib.nullcontext() if console is None else console.status(what),
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
        console.print(f"{what}: {seconds:.0f} s", highlight=False)
    return result, seconds
