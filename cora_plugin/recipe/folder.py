"""The output folder of a run: one run's files, all of them, or as it was before.

A run writes into a hidden folder in its output folder, under a lock. When everything is
there, that folder gets another hidden name, and its files move out of it. So a run that
is killed leaves hidden files that the next one finds: half a run's, which it removes,
or a whole run's, which it moves out first.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cora_plugin.adapters.errors import FileError
from cora_plugin.document import Document

REPORT, RECIPE, TEXT = "report.json", "recipe.yaml", "report.txt"
PICTURE, WIDTHS, TRAINING = "report.png", "widths.png", "qat.png"
PAGE = "report.html"
OWN = (REPORT, RECIPE, TEXT, PICTURE, WIDTHS, TRAINING, PAGE)
"""Files of every run, whose names exports may not have."""

HIDDEN = ".cora-"
"""What names begin with that are nobody else's."""
LOCK, PART, WHOLE = f"{HIDDEN}lock", f"{HIDDEN}part", f"{HIDDEN}whole"

FILES = "files"
"""The key of `report.json` with the names of all files of the run."""


def expanded(path: str) -> Path:
    """A path of a recipe, which may hold `~` and `$VARIABLES`."""
    return Path(os.path.expandvars(path)).expanduser()


@contextmanager
def opened(document: Document, folder: Path, keep: bool = True) -> Iterator[Path]:
    """A folder whose files replace those of an earlier run if the block succeeds.

    Args:
        document: The recipe's, for errors.
        folder: The output folder.
        keep: Whether there will be files; else only what stands in the way is found.

    Raises:
        FileError: The folder cannot be written to, or another run is writing to it.
    """
    made: list[Path] = []
    try:
        with ExitStack() as held:
            with _unwritable(document, folder):
                _make(folder, made)
                held.enter_context(locked(document, folder, "run"))
                _recover(folder)
                (folder / PART).mkdir()
            try:
                yield folder / PART
                if keep:
                    (folder / PART).rename(folder / WHOLE)
            finally:
                shutil.rmtree(folder / PART, ignore_errors=True)
            try:
                with _unwritable(document, folder, f"; all of it is in {WHOLE} there"):
                    _recover(folder)
            except KeyboardInterrupt:  # A few moves are left of a whole run.
                _recover(folder)
                raise
    finally:
        for each in reversed(made):
            with suppress(OSError):  # It is not empty.
                each.rmdir()


@contextmanager
def locked(document: Document, folder: Path, what: str) -> Iterator[None]:
    """Keep others that lock a folder out of it within the block.

    Args:
        document: The recipe's, for errors.
        folder: The folder, which exists.
        what: What it is that writes there, for errors.

    Raises:
        FileError: Another one is writing to it.
        OSError: There can be no lock.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        problem = (
            f"another {what} is writing to {folder}; wait for it, or name another "
            "folder"
        )
        raise document.error(("output",), problem, FileError) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()
        lock.release()


@contextmanager
def _unwritable(document: Document, folder: Path, kept: str = "") -> Iterator[None]:
    """Say which folder cannot be written to, and what stands in the way.

    Args:
        document: The recipe's.
        folder: The output folder.
        kept: What is left of a run that ends so.
    """
    try:
        yield
    except OSError as error:
        at = error.filename2 or error.filename
        where = f" ({at})" if at and Path(at) != folder else ""
        problem = f"cannot write to {folder}: {error.strerror}{where}{kept}"
        raise document.error(("output",), problem, FileError) from error
    except UnicodeEncodeError as error:
        problem = f"{str(folder)!a} is no name in this locale; name another folder"
        raise document.error(("output",), problem, FileError) from error


def _make(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, and note each that was made."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make(folder.parent, made)
    folder.mkdir()
    made.append(folder)


def _recover(folder: Path) -> None:
    """Remove half a run's files; let a whole run's replace those of the one before."""
    shutil.rmtree(folder / PART, ignore_errors=True)
    whole = folder / WHOLE
    if not whole.exists():
        return
    if (whole / REPORT).exists():
        new = _files(_report(whole))
        for name in set(_files(_report(folder))) - set(new):
            _forget(folder, name)
        # The report comes last: as long as the earlier one stands, so do the hidden
        # files, and all of this can be done again.
        for name in [*(n for n in new if n != REPORT), REPORT]:
            target = folder / name
            if (whole / name).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(whole / name, target)
    shutil.rmtree(whole)


def in_the_way(folder: Path, exports: Iterable[str]) -> tuple[str, str] | None:
    """What of a folder a run could not replace, or should not, for it is not a run's.

    Args:
        folder: The output folder.
        exports: The paths of the run's exports.

    Returns:
        The path of the export or the name of the run's own file, and what is wrong;
        None: nothing.
    """
    report = _report(folder)
    earlier = {*_files(report)}
    if isinstance(report, dict) and {"recipe", "rows"} <= report.keys():  # A run's.
        earlier |= {*OWN}
    for name in (*exports, *OWN):
        for each in _with_weights(name):
            path = folder / each
            for above in path.relative_to(folder).parents:
                if (folder / above).exists() and not (folder / above).is_dir():
                    return name, f"{folder / above} is a file; name another file"
            if path.is_dir():
                return name, f"{path} is a folder; name another file"
            if os.path.lexists(path) and Path(each).as_posix() not in earlier:
                problem = f"{path} is there, and no earlier run wrote it"
                return name, f"{problem}; move it, or name another folder in output"
    return None


def _report(folder: Path) -> Any:
    """What the report in a folder holds; None where none can be read."""
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        return None


def _files(report: Any) -> list[str]:
    """The files of a run, by its report; none where that is no run's."""
    try:
        names = report.get(FILES) or [each["path"] for each in report["exports"]]
        return [n for n in names if isinstance(n, str) and inside(n)]
    except (AttributeError, KeyError, TypeError):
        return []


def _forget(folder: Path, name: str) -> None:
    """Remove a file of an earlier run, and its folders if nothing else is in them."""
    with suppress(OSError):
        (folder / name).unlink()
        for above in (folder / name).parents:
            if above == folder:
                break
            above.rmdir()


def inside(path: str) -> bool:
    """Whether a path, relative to the output folder, names something in it."""
    parts = path.replace("\\", "/").split("/")
    absolute = os.path.isabs(path) or path[1:2] == ":" or not parts[0]
    return not absolute and ".." not in parts


def conflict(path: str, others: Collection[str]) -> str | None:
    """Why an export may not have this path, and what would do; None: it may.

    Args:
        path: Relative to the output folder.
        others: The paths of other exports.
    """
    if not inside(path):
        return f"{path!r} leaves the output folder; name a file in it"
    mine = _claimed(path)
    if "." in mine:
        return f"{path!r} is the output folder itself; name a file in it"
    if any(part.startswith(HIDDEN) for each in mine for part in each.split("/")):
        return f"names that begin with {HIDDEN} are the run's own; name another file"
    if any(_overlap(each, name) for each in mine for name in OWN):
        return f"{path} is in the way of the run's own files; name another file"
    for other in others:
        theirs = _claimed(other)
        if mine & theirs:
            return f"{path} is written twice; name another file"
        if any(_overlap(each, name) for each in mine for name in theirs):
            return f"{path} and {other} cannot both be files; name another file"
    return None


def _claimed(path: str) -> set[str]:
    """What an export writes, as file systems compare it: OpenVINO's weights, too."""
    plain = Path(path.replace("\\", "/")).as_posix().casefold()
    return {*_with_weights(plain)}


def _with_weights(path: str) -> tuple[str, ...]:
    """An export's path, and that of the weights beside an OpenVINO IR."""
    bare = path.removesuffix(".xml")
    return (path,) if bare == path else (path, f"{bare}.bin")


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are the same, or one a folder of the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def written(staging: Path) -> list[str]:
    """The names of all files in a folder, relative to it."""
    files = (path for path in staging.rglob("*") if path.is_file())
    return sorted(path.relative_to(staging).as_posix() for path in files)
