"""Writes files whole or not at all."""

import os
import platform
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a temporary path beside `path` that replaces it when the block succeeds.

    What writers of the same file left behind when they were killed is removed.

    Raises:
        OSError: The folder is missing, read-only or full, or `path` is a folder itself;
            what was there is as it was.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {target}: the folder {target.parent} does not exist"
        )
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder; name a file")
    try:
        _sweep(target)
        handle, temporary = tempfile.mkstemp(
            dir=target.parent,
            prefix=f"{_mark(target)}{os.getpid()}-",
            suffix=target.suffix,
        )
    except OSError as error:  # It names the temporary file.
        raise type(error)(f"cannot write {target}: {error.strerror}") from error
    os.close(handle)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException as error:
        # Some writers remove what they could not finish; the error is theirs.
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            why = f"cannot write {target}: {error.strerror}"
            raise OSError(why) from error
        raise


def _mark(target: Path) -> str:
    """What the names of a file's temporaries begin with on this machine."""
    return f".{target.stem}.{zlib.crc32(platform.node().encode()):08x}-"


def _sweep(target: Path) -> None:
    """Remove the temporary files of processes that are no more."""
    mark = _mark(target)
    for name in os.listdir(target.parent):
        process = name.removeprefix(mark).partition("-")[0]
        if name.startswith(mark) and process.isdecimal() and _ended(int(process)):
            (target.parent / name).unlink(missing_ok=True)


def _ended(process: int) -> bool:
    """Whether a process of this machine is no more, as far as can be told."""
    if os.name != "posix":  # Elsewhere, signal 0 is one that kills.
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
