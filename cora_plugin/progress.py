"""What is being waited for, in place of what the toolkits say meanwhile."""

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from rich.console import Console

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextlib.contextmanager
def quiet(console: Console, what: str) -> Iterator[None]:
    """Show a spinner with `what`; keep prints, progress bars, warnings and logs back.

    The console must hold its file, `Console(file=sys.stdout)`, or it is kept back too.
    """
    with (
        console.status(what),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def timed(
    console: Console,
    what: str,
    work: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> tuple[Result, float]:
    """Do some work quietly; return what it returns, and its seconds."""
    start = time.perf_counter()
    with quiet(console, what):
        result = work(*args, **kwargs)
    seconds = time.perf_counter() - start
    console.print(f"{what}: {seconds:.0f} s", highlight=False)
    return result, seconds
