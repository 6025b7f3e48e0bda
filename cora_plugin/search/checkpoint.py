"""The state of a search that learns, in a file that it can be resumed from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.files import whole_file

FORMAT = "cora-plugin search 1"


class State:
    """Parameters, the moments of their Adam, and the number of iterations done.

    Resumed at any iteration, a search goes on as if it had not been interrupted.

    Args:
        cutoff: The first parameter of the optimizer.
        optimizer: An Adam, whose other parameters belong to the state too.
        fingerprint: JSON of what the search depends on; a file of another is refused.
    """

    def __init__(
        self, cutoff: Tensor, optimizer: torch.optim.Adam, fingerprint: str
    ) -> None:
        self._cutoff = cutoff
        self._optimizer = optimizer
        self._fingerprint = fingerprint
        self.iteration = 0

    @property
    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def resume(self, path: str | None) -> int:
        """Take up the state in a file, if there is one; return the iterations done.

        Raises:
            CoRaError: The file is not a checkpoint of this search.
        """
        if path is None or not Path(path).exists():
            return 0
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise CoRaError(f"{path}: not a readable checkpoint: {error}") from error
        if header.get("format") != FORMAT:
            raise CoRaError(
                f"{path}: is not a checkpoint of a search; name another file in "
                "butterworth.checkpoint"
            )
        self._compare(path, json.loads(header["fingerprint"]))
        self.iteration = int(header["iteration"])
        step = torch.tensor(float(self.iteration))
        with torch.no_grad():
            for number, parameter in enumerate(self._parameters):
                parameter.copy_(tensors[f"{number}"])
                self._optimizer.state[parameter] = {
                    "step": step.clone(),
                    "exp_avg": tensors[f"{number}.exp_avg"],
                    "exp_avg_sq": tensors[f"{number}.exp_avg_sq"],
                }
        return self.iteration

    def _compare(self, path: str, made_for: dict[str, object]) -> None:
        for key, value in json.loads(self._fingerprint).items():
            if made_for.get(key) != value:
                raise CoRaError(
                    f"{path}: is of a search with {key} {_short(made_for.get(key))}, "
                    f"this one has {_short(value)}; delete the file to begin anew, or "
                    "name another in butterworth.checkpoint"
                )

    def save(self, path: str | None) -> None:
        """Write the state, whole or not at all."""
        if path is None or not self.iteration:
            return
        tensors = {}
        for number, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            tensors[f"{number}"] = parameter.detach().contiguous()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{number}.{key}"] = state[key].contiguous()
        header = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "iteration": str(self.iteration),
        }
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    @contextmanager
    def kept(self, path: str | None) -> Iterator[None]:
        """Write the state when the block is left, by an interrupt too.

        A state that an error was made from is not worth keeping.
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
