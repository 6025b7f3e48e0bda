"""Checkpoints, from which a learning search can be resumed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import FileError
from cora_plugin.states import read_state, write_state

TAG = "cora-plugin search 3"
"""What a file begins with."""

_WAY_OUT = "delete it to begin anew, or name another file in butterworth.checkpoint"


class State:
    """Parameters, their optimizer, and the number of iterations done.

    Resumed at any iteration, a search goes on as if it had not been interrupted.

    Args:
        optimizer: Holds the parameters, which belong to the state.
        fingerprint: JSON of what the search depends on; other files are refused.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, fingerprint: str) -> None:
        self._optimizer = optimizer
        self._fingerprint = fingerprint
        self._iteration = 0
        self._moving = False
        optimizer.register_step_pre_hook(self._moves)

    def _moves(self, *_: Any) -> None:
        self._moving = True

    @property
    def iteration(self) -> int:
        """Iterations done; setting it says that the parameters are those after it."""
        return self._iteration

    @iteration.setter
    def iteration(self, done: int) -> None:
        self._iteration, self._moving = done, False

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def resume(self, path: str | None, iterations: int) -> int:
        """Restore the state from a file, if there is one; return the iterations done.

        Args:
            path: The file; None: there is none.
            iterations: How many the search is to do in all.

        Raises:
            FileError: The file is damaged or not a checkpoint of this search, or has
                done more iterations.
        """
        if path is None:
            return 0
        if not Path(path).parent.is_dir():
            raise FileError(
                f"{path}: the folder {Path(path).parent} does not exist; make it, or "
                "name another file in butterworth.checkpoint"
            )
        if not Path(path).exists():
            return 0
        state = read_state(path, TAG, "search", _WAY_OUT)
        try:
            self._compare(path, json.loads(state["fingerprint"]))
            done = self._take(path, state, iterations)
        except (
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, FileError):
                raise
            problem = f"{path}: holds no state of this search; {_WAY_OUT}"
            raise FileError(problem) from error
        self.iteration = done
        return done

    def _take(self, path: str, state: dict[str, Any], iterations: int) -> int:
        """Take parameters and optimizer over; return the iterations done.

        Raises:
            FileError: They are more than are asked for.
        """
        done = int(state["iteration"])
        if done > iterations:
            raise FileError(
                f"{path}: has done {done} iterations, and {iterations} are asked for; "
                f"set butterworth.iterations to {done} or more, or {_WAY_OUT}"
            )
        with torch.no_grad():
            for parameter, value in zip(
                self._parameters, state["parameters"], strict=True
            ):
                parameter.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        return done

    def _compare(self, path: str, made_for: dict[str, object]) -> None:
        for key, value in json.loads(self._fingerprint).items():
            if made_for.get(key) != value:
                raise FileError(
                    f"{path}: is of a search with {key} {_short(made_for.get(key))}, "
                    f"this one has {_short(value)}; {_WAY_OUT}"
                )

    def save(self, path: str | None) -> None:
        """Write the state, whole or not at all.

        Not between an iteration's step and its end: the file before then stands. Of
        several processes the first writes it.
        """
        if path is None or not self.iteration or self._moving or processes.rank():
            return
        state = {
            "fingerprint": self._fingerprint,
            "iteration": self.iteration,
            "parameters": [parameter.detach() for parameter in self._parameters],
            "optimizer": self._optimizer.state_dict(),
        }
        write_state(path, TAG, state)

    @contextmanager
    def kept(self, path: str | None) -> Iterator[None]:
        """Write the state when the block is left, by an interrupt too.

        After an error the state is not saved.
        """
        try:
            yield
        except KeyboardInterrupt:
            self.save(path)
            raise
        self.save(path)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
