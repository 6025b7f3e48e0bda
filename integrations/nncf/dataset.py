"""Checks the calibration data that NNCF passes to a model."""

from collections.abc import Iterable, Iterator
from typing import Any

import nncf
from torch import Tensor

from cora_plugin.adapters.errors import DataError


class ImageDataset(nncf.Dataset):
    """An NNCF dataset that refuses items other than one tensor of images.

    NNCF calls the model with whatever a dataset yields, so `(images, targets)` would
    fail deep inside a layer.

    Args:
        dataset: The dataset, whose items are handed on as they are.
    """

    def __init__(self, dataset: nncf.Dataset) -> None:
        super().__init__(dataset)
        self._dataset = dataset

    def get_data(self, indices: list[int] | None = None) -> Iterable[Any]:
        """The source's items."""
        items: Iterable[Any] = self._dataset.get_data(indices)
        return items

    def get_inference_data(self, indices: list[int] | None = None) -> Iterator[Any]:
        """The model's inputs.

        Raises:
            DataError: An item is not one tensor.
        """
        for index, item in enumerate(self._dataset.get_inference_data(indices)):
            if isinstance(item, dict):
                parts = tuple(item.values())
            else:
                parts = item if isinstance(item, tuple) else (item,)
            if len(parts) != 1 or not isinstance(parts[0], Tensor):
                raise DataError(
                    f"calibration data: item {index} of the nncf.Dataset is "
                    f"{_describe(item)}, and NNCF would call the model with that; pick "
                    "one tensor of images, as by nncf.Dataset(loader, lambda item: "
                    "item[0])"
                )
            yield item

    def get_length(self) -> int | None:
        """Number of items, if the source knows."""
        length: int | None = self._dataset.get_length()
        return length

    def get_batch_size(self) -> int | None:
        """The source's batch size, if it has one."""
        size: int | None = self._dataset.get_batch_size()
        return size


def _describe(item: Any) -> str:
    name = type(item).__name__
    if not isinstance(item, dict | list | tuple):
        return f"a {name}"
    parts = item.values() if isinstance(item, dict) else item
    return f"a {name} of ({', '.join(type(part).__name__ for part in parts)})"
