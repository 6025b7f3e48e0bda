"""Loads NNCF's C++ extension without its time limit, and detects dead builds."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nncf
import torch
import torch.utils.cpp_extension as cpp_extension

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.integrations.nncf import private

log = logging.getLogger(__name__)

STALE = 900.0
"""Age of a build's lock, in seconds, at which nobody can be at work behind it."""


def load_extension(device: torch.device = private.CPU) -> None:
    """Load what NNCF would load at its first quantizer, compiling it if need be.

    The compilation takes over a minute, more than NNCF allows itself; a limit that is
    set in the environment is respected. Where CUDA's cannot be compiled, for want of
    `nvcc`, NNCF's operations in plain torch take its place.

    Args:
        device: Where the model is.

    Raises:
        CoRaError: An interrupted build has left its lock, which torch would wait for
            without end.
    """
    if private.is_loaded(device):
        return
    folder = private.build_folder(device)
    # Elsewhere torch's lock is the kernel's, which ends with its holder.
    if hasattr(cpp_extension, "FileBaton"):
        await_lock(folder / "lock")
    if not is_compiled(device):
        log.warning(
            "NNCF compiles its C++ extension, once, into %s: a minute or two", folder
        )
    with _no_time_limit():
        try:
            private.load(device)
        except nncf.InstallationError as error:
            log.warning("%s\nIts operations in plain torch are used: slower.", error)
            private.load_reference(device)


def is_compiled(device: torch.device = private.CPU) -> bool:
    """Whether an earlier run has left the compiled extension on this machine."""
    return any(private.build_folder(device).glob("*.so"))


def await_lock(lock: Path, stale: float = STALE, pause: float = 1.0) -> None:
    """Wait for another process's build to finish.

    Args:
        lock: The file that stands while it builds.
        stale: Age in seconds at which the build is taken for dead.
        pause: Seconds between two looks.

    Raises:
        CoRaError: The build is dead.
    """
    while True:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return
        if age > stale:
            raise CoRaError(
                f"NNCF's extension: the lock {lock} is {age / 60:.0f} minutes old, "
                f"left by a build that was interrupted; delete it: rm -rf {lock.parent}"
            )
        time.sleep(pause)


@contextmanager
def _no_time_limit() -> Iterator[None]:
    variable = private.EXTENSION_LOAD_TIMEOUT_ENV_VAR
    if variable in os.environ:
        yield
        return
    os.environ[variable] = "0"
    try:
        yield
    finally:
        os.environ.pop(variable, None)
