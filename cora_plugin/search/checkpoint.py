"""Checkpoints, from which a learning search can be resumed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cora_plugin.adapters.errors import FileError
from cora_plugin.adapters.files import whole_file

FORMAT = "cora-plugin search 2"


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
        self.iteration = 0

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def resume(self, path: str | None) -> int:
        """Restore the state from a file, if there is one; return the iterations done.

        Raises:
            FileError: The file is not a checkpoint of this search.
        """
        if path is None or not Path(path).exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # Of many kinds; torch names none as its own.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileError(f"{path}: not a readable checkpoint: {reason}") from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise FileError(
                f"{path}: is not a checkpoint of a search; name another file in "
                "butterworth.checkpoint"
            )
        self._compare(path, json.loads(state["fingerprint"]))
        self.iteration = state["iteration"]
        with torch.no_grad():
            for parameter, value in zip(
                self._parameters, state["parameters"], strict=True
            ):
                parameter.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        return self.iteration

    def _compare(self, path: str, made_for: dict[str, object]) -> None:
        for key, value in json.loads(self._fingerprint).items():
            if made_for.get(key) != value:
                raise FileError(
                    f"{path}: is of a search with {key} {_short(made_for.get(key))}, "
                    f"this one has {_short(value)}; delete the file to begin anew, or "
                    "name another in butterworth.checkpoint"
                )

    def save(self, path: str | None) -> None:
        """Write the state, whole or not at all."""
        if path is None or not self.iteration:
            return
        state = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "iteration": self.iteration,
            "parameters": [parameter.detach() for parameter in self._parameters],
            "optimizer": self._optimizer.state_dict(),
        }
        with whole_file(path) as temporary:
            torch.save(state, temporary)

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
