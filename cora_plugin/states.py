"""States of long work in files: written whole or not at all, and checked when read."""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from cora_plugin.adapters.errors import FileError
from cora_plugin.adapters.files import whole_file

DIGITS = 64
"""Of a SHA-256 in hex."""


def write_state(path: str, tag: str, state: dict[str, Any]) -> None:
    """Write a state: a line that says what it is, its SHA-256, and what torch makes.

    Args:
        path: The file.
        tag: What it is, and the version of the format.
        state: Tensors and plain values.
    """
    written = io.BytesIO()
    torch.save(state, written)
    content = written.getvalue()
    checksum = hashlib.sha256(content).hexdigest()
    with whole_file(path) as temporary:
        Path(temporary).write_bytes(f"{tag}\n{checksum}\n".encode() + content)


def read_state(path: str, tag: str, what: str, way_out: str) -> dict[str, Any]:
    """Read what `write_state` wrote; no code in it is run.

    Args:
        path: The file.
        tag: As it was written.
        what: What errors call it.
        way_out: What they say to do.

    Raises:
        FileError: It is a folder, damaged, or something else.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    head = f"{tag}\n".encode()
    if not content.startswith(head):
        raise FileError(
            f"{path}: is not a readable checkpoint of a {what}, or one of an earlier "
            f"version; {way_out}"
        )
    start = len(head) + DIGITS + 1
    checksum, payload = content[len(head) : start], content[start:]
    if hashlib.sha256(payload).hexdigest().encode() + b"\n" != checksum:
        raise FileError(f"{path}: is damaged, for its checksum is another; {way_out}")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # Of many kinds; torch names none as its own.
        raise _foreign(path, what, way_out) from error
    if not isinstance(state, dict):
        raise _foreign(path, what, way_out)
    return state


def _foreign(path: str, what: str, way_out: str) -> FileError:
    return FileError(f"{path}: holds no state of a {what}; {way_out}")
