"""Says of a toolkit's failure what was being done, with its own error behind."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from cora_plugin.adapters.errors import CoRaError, ToolkitError

log = logging.getLogger(__name__)


@contextmanager
def doing(toolkit: str, what: str, hints: Iterable[str] = ()) -> Iterator[None]:
    """Within it whatever the toolkit raises becomes a line, and stands behind it.

    Args:
        toolkit: The toolkit's title.
        what: What is done, as in "calibrating the model".
        hints: What may be behind a failure, looked up where there is one.

    Raises:
        ToolkitError: The block failed by an error that is not ours; its traceback is
            in the log.
    """
    try:
        yield
    # Missing packages and files are named as they are.
    except (CoRaError, ImportError, OSError):
        raise
    except Exception as error:
        log.info("%s failed at %s", toolkit, what, exc_info=error)
        said = "; ".join((in_a_line(error), *hints))
        raise ToolkitError(f"{toolkit} failed at {what}: {said}") from error


def in_a_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    said = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
