"""What an entry of the record is: a name, and the work that its values come of."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load

from recorder.values import of_arrays, of_file


@dataclass(frozen=True)
class Room:
    """Where an entry works.

    Args:
        folder: An empty folder of its own.
        earlier: What an earlier record has of this entry, or nothing.
    """

    folder: Path
    earlier: Mapping[str, Any]


Entry = Callable[[Room], dict[str, Any]]
Entries = dict[str, Entry]
"""By name, such as `brevitas/settings/default`."""


def of_adapters(
    path: Path, room: Room, loaded: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """A file of adapters, and what comes of it, and of the earlier record's, loaded.

    The file itself is in the record, so that a later version must read it.

    Args:
        path: The file.
        room: The entry's.
        loaded: Puts a file into a fresh model and returns that model's outputs.
    """
    data = path.read_bytes()
    old = room.folder / "earlier.safetensors"
    kept = room.earlier.get("content")
    old.write_bytes(data if kept is None else base64.b64decode(kept))
    return {
        "file": of_file(path),
        "content": base64.b64encode(data).decode(),
        "tensors": of_arrays(load(data).values()),
        "loaded": loaded(path),
        "loaded from the earlier file": loaded(old),
    }
