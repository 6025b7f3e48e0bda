"""Checks the calibration data that NNCF passes to a model."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import nncf
import torch
from torch import nn

from cora_plugin.adapters.errors import DataError
from cora_plugin.batches import tensors
from cora_plugin.integrations.scopes import evaluation
from cora_plugin.items import not_running


class ImageDataset(nncf.Dataset):
    """An NNCF dataset that refuses items which the model cannot be called with.

    NNCF calls the model with whatever a dataset yields, so `(images, targets)` would
    fail deep inside a layer.

    Args:
        dataset: The dataset, whose items are handed on as they are.
        model: The model, whose arguments the items have to be.
        run: Whether the model, a float one, is run on the first item.
    """

    def __init__(
        self, dataset: nncf.Dataset, model: nn.Module | None = None, run: bool = False
    ) -> None:
        super().__init__(dataset)
        self._dataset = dataset
        self._model = model
        self._run = run

    def get_data(self, indices: list[int] | None = None) -> Iterable[Any]:
        """The source's items."""
        items: Iterable[Any] = self._dataset.get_data(indices)
        return items

    def get_inference_data(self, indices: list[int] | None = None) -> Iterator[Any]:
        """The model's inputs.

        Raises:
            DataError: An item is not what the model takes.
        """
        for index, item in enumerate(self._dataset.get_inference_data(indices)):
            if not any(True for _ in tensors(item)) or not self._takes(item):
                raise DataError(
                    f"calibration data: item {index} of the nncf.Dataset is "
                    f"{_describe(item)}, and NNCF would call the model with that; pick "
                    "what the model takes, as by nncf.Dataset(loader, lambda item: "
                    "item[0])"
                )
            if self._run and self._model is not None:
                self._run = False  # One is enough.
                _try(self._model, index, item)
            yield item

    def _takes(self, item: Any) -> bool:
        """Whether the model has as many arguments as NNCF would call it with."""
        arguments = item if isinstance(item, tuple) else (item,)
        if self._model is None:
            return True
        signature = inspect.signature(self._model.forward)
        try:
            if isinstance(item, dict):
                signature.bind(**item)
            else:
                signature.bind(*arguments)
        except TypeError:
            return False
        return not isinstance(item, list)

    def get_length(self) -> int | None:
        """Number of items, if the source knows."""
        length: int | None = self._dataset.get_length()
        return length

    def get_batch_size(self) -> int | None:
        """The source's batch size, if it has one."""
        size: int | None = self._dataset.get_batch_size()
        return size


@torch.no_grad()
def _try(model: nn.Module, index: int, item: Any) -> None:
    """Run a model on an item.

    Raises:
        DataError: It does not run.
    """
    keywords = item if isinstance(item, dict) else {}
    arguments = item if isinstance(item, tuple) else (item,)
    try:
        with torch.random.fork_rng(devices=[]), evaluation(model):
            model(**keywords) if keywords else model(*arguments)
    except Exception as error:
        raise not_running(index, item, error) from error


def _describe(item: Any) -> str:
    name = type(item).__name__
    if not isinstance(item, dict | list | tuple):
        return f"a {name}"
    parts = item.values() if isinstance(item, dict) else item
    return f"a {name} of ({', '.join(type(part).__name__ for part in parts)})"
