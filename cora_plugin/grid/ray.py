"""Runs cells on a Ray cluster: each where there is room, again where it was lost.

A cell goes out as its recipe and comes back as its files. On its node it is measured as
at home, by `cora_plugin.grid.schedule` in a process of its own, so that limits, logs
and reasons are the same, and what a toolkit does to torch stays out of Ray's workers.
"""

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.files import whole_file
from cora_plugin.grid.cells import Cell
from cora_plugin.grid.folder import Folder
from cora_plugin.grid.schedule import Done, Limits, Tell, run_cells
from cora_plugin.grid.section import RayConfig
from cora_plugin.recipe.folder import inside

log = logging.getLogger(__name__)

LOOK = 1.0
"""Seconds between two looks at what runs."""

KNOCK = 10.0
"""Seconds that a cluster has to answer."""

ASIDE = "cora-cell-"
"""Begins the names of folders of cells on their nodes; the worker's process follows."""

TEXTS = (".yaml", ".json", ".log", ".txt", ".html")
"""Files that name the folder they are in."""

STOP = 30.0
"""Seconds that cancelled cells have to end by themselves."""

Files = Mapping[str, bytes]
"""What is in files, by their paths below the folder of all cells."""


def run_on_ray(
    waiting: Sequence[Cell],
    folder: Folder,
    jobs: int | None,
    limits: Limits,
    done: Done,
    tell: Tell,
    *,
    address: str,
    config: RayConfig,
) -> None:
    """Measure cells on a cluster; what came of each is in the folder.

    On every way out, Ctrl-C included, no cell is left running.

    Args:
        waiting: The cells, in order.
        folder: Where they are written.
        jobs: How many are sent at once; None: all, to run where there is room.
        limits: As for `run_cells`; the memory is asked for, too.
        done: Called after each.
        tell: Called with what runs on some node and how many wait.
        address: The cluster's; blank: one that runs here, or else a new one of this
            machine alone.
        config: What a cell takes.

    Raises:
        CoRaError: There is no such cluster.
    """
    memory = {} if limits.gib is None else {"memory": int(limits.gib * 2**30)}
    with _connected(address):
        _warn_of_waiting(config, limits)
        task = ray.remote(
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            max_retries=config.retries,
            **memory,
        )(_measured)
        board: Any = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()
        left, sent = list(waiting), dict[Any, Cell]()
        try:
            while left or sent:
                while left and (jobs is None or len(sent) < jobs):
                    cell = left.pop(0)
                    home = (os.getcwd(), str(folder.cells.resolve()))
                    sent[task.remote(cell, limits, *home, board)] = cell
                ended, _ = ray.wait([*sent], timeout=LOOK)
                for each in ended:
                    cell = sent.pop(each)
                    _keep(each, cell, folder, config)
                    done(cell)
                running = _running(board, [*sent.values()])
                tell(running, len(left) + len(sent) - len(running))
        finally:
            _cancel([*sent])


def _cancel(sent: Sequence[Any]) -> None:
    """End cells on all nodes; those that answer remove what they had written there."""
    for each in sent:
        ray.cancel(each)
    if sent:
        ray.wait([*sent], num_returns=len(sent), timeout=STOP)
    for each in sent:
        ray.cancel(each, force=True)


class _Board:
    """Knows which cells have begun, as Ray does not tell."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def begin(self, name: str) -> None:
        self._names.add(name)

    def begun(self) -> set[str]:
        return self._names


def _running(board: Any, sent: Sequence[Cell]) -> list[Cell]:
    try:
        begun = ray.get(board.begun.remote(), timeout=LOOK)
    except RayError:  # It is on its way to another node, and has forgotten all.
        return []
    return [cell for cell in sent if cell.name in begun]


def _measured(cell: Cell, limits: Limits, start: str, home: str, board: Any) -> Files:
    """Measure a cell on this node; its files, as if they were at home.

    Args:
        cell: The cell.
        limits: Beyond which it is stopped.
        start: The folder that paths of the recipe are relative to.
        home: The folder of all cells where the comparison runs.
        board: Is told of the beginning.
    """
    if not os.path.isdir(start):
        raise CoRaError(
            f"{socket.gethostname()} has no folder {start}, in which compare was "
            "called; call it in one that all nodes share"
        )
    os.chdir(start)
    board.begin.remote(cell.name)
    _clear()
    with tempfile.TemporaryDirectory(prefix=f"{ASIDE}{os.getpid()}-") as name:
        folder = Folder(Path(name).resolve())
        folder.cells.mkdir()
        values = {**cell.values, "output": str(folder.cells / cell.name)}
        here = replace(cell, values=values)
        run_cells([here], folder, 1, limits, lambda _: None, lambda *_: None)
        away, back = (os.fsencode(path) for path in (folder.cells, home))
        found: dict[str, bytes] = {}
        for path in folder.cells.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                data = data.replace(away, back) if path.suffix in TEXTS else data
                found[path.relative_to(folder.cells).as_posix()] = data
        return found


def _clear() -> None:
    """Remove what killed workers have left aside on this node."""
    for old in Path(tempfile.gettempdir()).glob(f"{ASIDE}*"):
        pid = old.name.removeprefix(ASIDE).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)


def _keep(sent: Any, cell: Cell, folder: Folder, config: RayConfig) -> None:
    """Write a cell's files, or why there are none."""
    folder.prepare(cell)
    try:
        files: Files = ray.get(sent)
    except RayTaskError as error:  # Of the task itself: trying again would not help.
        cause = error.cause
        said = str(cause).splitlines() or ["no message"]
        ours = isinstance(cause, CoRaError)
        reason = said[0] if ours else f"{type(cause).__name__}: {said[0]}"
        folder.fail(cell, f"on a node of Ray: {reason}")
        return
    except RayError as error:
        said = str(error).splitlines() or [type(error).__name__]
        folder.fail(
            cell,
            f"its worker on Ray was lost, and so in all {config.retries} retries "
            f"(compare.ray.retries): {said[0]}",
        )
        return
    shutil.rmtree(folder.cells / cell.name, ignore_errors=True)
    # The outcome comes last: until it is there, the cell counts as not measured.
    outcome = folder.outcome_path(cell)
    for name, data in sorted(files.items(), key=lambda file: file[0] == outcome.name):
        path = folder.cells / name
        if inside(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                Path(temporary).write_bytes(data)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster within the block, if this process is none yet."""
    if ray.is_initialized():
        yield
        return
    # Nobody was asked whether to report anything.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _knock(address)
        with _own_signals():
            ray.init(
                address or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, RuntimeError, ValueError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        where = f"at {address!r} " if address else ""
        raise CoRaError(
            f"--ray: there is no cluster {where}that can be used ({said[0]}); start "
            "one by `ray start --head`, or leave the address out"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Find out at once whether anyone listens, as Ray tries for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray ends its driver by SIGTERM; here that is an interrupt like any other."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _warn_of_waiting(config: RayConfig, limits: Limits) -> None:
    """Say so where no node has what a cell takes; one may still join."""
    wanted = {"CPU": config.cpus, "GPU": config.gpus}
    wanted["memory"] = (limits.gib or 0) * 2**30
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for node in nodes:
        if all(node.get(name, 0) >= amount for name, amount in wanted.items()):
            return
    log.warning(
        "no node of the Ray cluster has cpus=%g, gpus=%g and %g GiB for a cell "
        "(compare.ray, compare.gib): cells wait until one joins; Ctrl-C gives up",
        config.cpus,
        config.gpus,
        limits.gib or 0,
    )
