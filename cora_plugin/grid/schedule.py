"""Runs cells as processes, several at once, each with limits of time and memory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from cora_plugin.grid.cells import Cell
from cora_plugin.grid.folder import Folder

POLL = 0.1
"""Seconds between two looks at the processes."""

Done = Callable[[Cell], None]
"""Called with a cell that has ended."""

Tell = Callable[[Sequence[Cell], int], None]
"""Called with the cells that are running and how many still wait."""


@dataclass(frozen=True)
class Limits:
    """What a cell may take: minutes, and GiB of memory with what it has started."""

    minutes: float
    gib: float | None = None


@dataclass(frozen=True)
class _Running:
    cell: Cell
    process: "subprocess.Popen[bytes]"
    end: float


def run_cells(
    waiting: Sequence[Cell],
    folder: Folder,
    jobs: int,
    limits: Limits,
    done: Done,
    tell: Tell,
) -> None:
    """Measure cells; what came of each is in the folder.

    On every way out, Ctrl-C included, no process is left running.

    Args:
        waiting: The cells, in order.
        folder: Where they are written.
        jobs: How many run at once.
        limits: Beyond which a cell is stopped.
        done: Called after each.
        tell: Called whenever a cell begins or ends.
    """
    left, running = list(waiting), list[_Running]()
    try:
        while left or running:
            while left and len(running) < jobs:
                running.append(_start(left.pop(0), folder, jobs, limits))
                tell([each.cell for each in running], len(left))
            time.sleep(POLL)
            for each in [*running]:
                reason = _ended(each, folder, limits)
                if reason is None:
                    continue
                running.remove(each)
                _stop(each.process)
                if reason:
                    folder.fail(each.cell, reason)
                done(each.cell)
                tell([each.cell for each in running], len(left))
    finally:
        for each in running:
            _stop(each.process)


def _start(cell: Cell, folder: Folder, jobs: int, limits: Limits) -> _Running:
    folder.prepare(cell)
    paths = (folder.recipe_path(cell), folder.outcome_path(cell))
    command = [sys.executable, "-m", "cora_plugin.grid.cell", *map(str, paths)]
    command += [cell.latency] if cell.latency else []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with folder.log_path(cell).open("wb") as log:
        process = subprocess.Popen(
            command,
            # The cell ends when this pipe does, however this process ends.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Processes that share the cores would else each take all of them.
            env={"OMP_NUM_THREADS": str(threads), **os.environ},
            # Its own group, so that what it has started is stopped with it.
            start_new_session=True,
        )
    return _Running(cell, process, time.monotonic() + 60 * limits.minutes)


def _ended(running: _Running, folder: Folder, limits: Limits) -> str | None:
    """Why a cell has no outcome; blank where it has one, None where it still runs."""
    code = running.process.poll()
    if code is None:
        held = _held(running.process.pid) if limits.gib else 0.0
        if limits.gib and held > limits.gib:
            _stop(running.process)
            reason = f"out of memory at {held:.2f} GiB"
            return f"{reason}; raise compare.gib and pass --retry"
        if time.monotonic() < running.end:
            return None
        _stop(running.process)
        return (
            f"out of time after {limits.minutes:g} minutes; raise compare.minutes and "
            "pass --retry"
        )
    if folder.outcome(running.cell) is not None:
        return ""
    log = folder.log_path(running.cell)
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", as when memory is short" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{memory}; see {log}"
    return f"its process ended with exit code {code}; see {log}"


def _held(pid: int) -> float:
    """GiB that a process and those it has started hold now."""
    total = 0
    with suppress(psutil.Error):  # It has just ended.
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    return total / 2**30


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
