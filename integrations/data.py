"""Calibration data that is checked before a toolkit walks it."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from cora_plugin.adapters.errors import CoRaError, DataError, ModelError
from cora_plugin.integrations.doing import in_a_line
from cora_plugin.integrations.scopes import evaluation
from cora_plugin.items import Reader, check_loader
from cora_plugin.outputs import Batch, run


class CalibrationData(Iterable[Batch]):
    """The batches of a loader as a float model takes them, as often as they are walked.

    Args:
        model: The float model, which is run on the first batch.
        loader: Yields images [N, …], `(images, targets)`, or what else the model takes.

    Raises:
        DataError: From the constructor or on the way: the loader is none, is empty or
            can be walked once, or the model does not run with what it yields.
    """

    def __init__(self, model: nn.Module, loader: Iterable[Any]) -> None:
        check_loader(loader, model)
        _check_model(model)
        if isinstance(loader, Iterator):
            raise DataError(
                "calibration data: it is walked more than once, and an iterator can be "
                "walked once; pass a list of batches or a DataLoader"
            )
        self._loader = loader
        first = next(self._items(), None)
        if first is None:
            raise DataError(
                "calibration data: the loader is empty; pass a few dozen images"
            )
        self._reader = Reader(partial(run, model))
        with torch.random.fork_rng(devices=[]), evaluation(model):
            self.first = self._reader(first)
        # As NNCF asks loaders for it.
        self.batch_size = getattr(loader, "batch_size", None)

    def __iter__(self) -> Iterator[Batch]:
        """Walk the loader."""
        reader = self._reader.again()
        for item in self._items():
            yield reader(item)

    def _items(self) -> Iterator[Any]:
        """What the loader yields; its own errors are no toolkit's.

        Raises:
            DataError: An item cannot be made; the loader's error is behind.
        """
        index = 0
        try:
            for item in self._loader:
                yield item
                index += 1
        except CoRaError:
            raise
        # Whatever a data set of somebody's own may raise.
        except Exception as error:
            problem = f"item {index} cannot be made: {in_a_line(error)}"
            raise DataError(f"calibration data: {problem}") from error


def _check_model(model: Any) -> None:
    if isinstance(model, nn.Module):
        return
    what = f"is a {type(model).__name__}"
    if isinstance(model, type):
        what = f"is the class {model.__name__}; call it to make one"
    raise ModelError(f"the model {what}; pass a torch.nn.Module")
