"""The state of a training in a file, from which it goes on as if never interrupted."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cora_plugin.adapters.errors import FileError
from cora_plugin.states import read_state, write_state

TAG = "cora-plugin qat 5"
"""What a file begins with."""

_WAY_OUT = "delete the file to begin anew, or name another in qat.checkpoint"


def save(path: str, made_for: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a state, whole or not at all.

    Args:
        path: The file.
        made_for: Plain values that must be the same where it is loaded.
        state: Tensors and plain values.
    """
    write_state(path, TAG, {"made for": json.dumps(made_for), **state})


def load(path: str, made_for: dict[str, Any]) -> dict[str, Any] | None:
    """Read what `save` wrote; None if there is no file.

    Raises:
        FileError: The file is no checkpoint of this training.
        OSError: There is none, and none can be written.
    """
    if not Path(path).exists():
        save(path, made_for, {})  # Before hours of training, not after.
        Path(path).unlink()
        return None
    state = read_state(path, TAG, "training", _WAY_OUT)
    try:
        before = dict(json.loads(state["made for"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: holds no state of a training; {_WAY_OUT}") from error
    for key, value in json.loads(json.dumps(made_for)).items():
        if before.get(key) != value:
            raise FileError(
                f"{path}: is of a training with {key} {before.get(key)}, this one has "
                f"{value}; {_WAY_OUT}"
            )
    return state


def randomness(own: torch.Generator | None = None) -> dict[str, Any]:
    """The state of random generators that loaders and layers draw from.

    Args:
        own: The loader's own generator, if it has one.
    """
    of_numpy: Any = np.random.get_state()
    name, keys, *rest = of_numpy
    found: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if own is not None:
        found["own"] = own.get_state()
    return found


def set_randomness(state: dict[str, Any], own: torch.Generator | None = None) -> None:
    """Put the generators back to a state."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "own" in state and own is not None:
        own.set_state(state["own"])
