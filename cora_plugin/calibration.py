"""Splits calibration images into a calibration set and a held-out set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cora_plugin.adapters.errors import DataError
from cora_plugin.adapters.operation import first_nonfinite

GOLDEN = (5**0.5 - 1) / 2
"""The golden ratio's fraction."""


class Reservoir:
    """A sample of images that stream by, drawn uniformly (reservoir sampling).

    Args:
        size: How many images are kept.
        seed: Seeds the sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = torch.Generator().manual_seed(seed)
        self._offered = 0
        self.images: list[Tensor] = []

    def offer(self, image: Tensor) -> Tensor | None:
        """Take an image or not; returns the one that is not, or no longer, kept."""
        self._offered += 1
        if len(self.images) < self._size:
            self.images.append(image.clone())
            return None
        slot = int(torch.randint(self._offered, (), generator=self._random))
        if slot < self._size:
            self.images[slot], image = image.clone(), self.images[slot]
        return image


class ImageSplit:
    """Splits images as they stream by; keeps those held out and a sample of the rest.

    Each image is seen once, so the loader may shuffle or be a generator. Held-out
    images never calibrate; the sample is drawn uniformly from those that do, and the
    reserve from those that the sample does not hold. The same seed gives the same split
    and the same samples.

    Args:
        held_out: Share of the images that is held out, spread evenly.
        sample_size: Number of images in the sample.
        seed: Seeds the samples, and decides which images are held out.
        reserve_size: Number of images in reserve.
    """

    def __init__(
        self, held_out: float, sample_size: int, seed: int, reserve_size: int = 0
    ) -> None:
        self._share = held_out
        # The golden ratio's multiples spread evenly: each seed holds out others.
        self._phase = seed * GOLDEN % 1
        self._held: list[Tensor] = []
        self._sample = Reservoir(sample_size, seed)
        self._reserve = Reservoir(reserve_size, seed)
        self._items = 0
        self._shape: list[int] | None = None
        self._seen = 0
        self._batch = 1
        self.images = 0

    def keep(self, item: Any) -> Tensor:
        """Split what a loader yielded; return the images to calibrate with, maybe none.

        Raises:
            DataError: The item is not images of one shape, or holds NaN or inf.
        """
        batch = _images(item, self._items)
        shape = list(batch.shape[1:])
        if self._shape not in (None, shape):
            raise DataError(
                f"calibration data: item {self._items} has images of shape {shape}, "
                f"those before had {self._shape}; resize or crop them to one shape"
            )
        self._shape = shape
        self._items += 1
        self._batch = max(self._batch, len(batch))
        counts = torch.arange(self._seen, self._seen + len(batch) + 1) * self._share
        counts = counts + self._phase
        held = counts[1:].floor() > counts[:-1].floor()
        self._seen += len(batch)
        self._held += batch[held].clone().unbind()
        kept = batch[~held]
        for image in kept:
            self._offer(image)
        return kept

    def close(self) -> None:
        """Check, once all images have passed, that there were enough.

        Raises:
            DataError: No image is left to calibrate with, or none to hold out.
        """
        if not self.images:
            raise DataError(
                f"calibration data: {self._seen} images are too few to calibrate and "
                "hold one out; pass at least a few dozen"
            )
        if not self._held:
            raise DataError(
                f"calibration data: {self._seen} images leave none to hold out at "
                f"held_out={self._share}; pass more images or raise held_out"
            )

    def _offer(self, image: Tensor) -> None:
        self.images += 1
        left = self._sample.offer(image)
        if left is not None:
            self._reserve.offer(left)

    def held_out(self) -> tuple[Tensor, ...]:
        """The held-out images in batches."""
        return _batches(self._held, self._batch)

    def sample(self, limit: int | None = None) -> tuple[Tensor, ...]:
        """The sampled images in batches, at most `limit` of them."""
        return _batches(self._sample.images[:limit], self._batch)

    def reserve(self) -> tuple[Tensor, ...]:
        """Images in batches that calibrate, but are not in the sample; maybe none."""
        return _batches(self._reserve.images, self._batch)

    @property
    def sampled(self) -> Sequence[Tensor]:
        """The sampled images one by one, not copied."""
        return self._sample.images


def _batches(images: list[Tensor], size: int) -> tuple[Tensor, ...]:
    if not images:
        return ()
    batches: tuple[Tensor, ...] = torch.stack(images).split(size)
    return batches


def _images(item: Any, index: int) -> Tensor:
    images = item[0] if isinstance(item, list | tuple) and item else item
    if not isinstance(images, Tensor) or images.ndim < 2:
        raise DataError(
            f"calibration data: item {index} is {_describe(item)}; the loader should "
            "yield batches of images [N, …], alone or first in a tuple such as "
            "(images, targets)"
        )
    if not images.is_floating_point():
        raise DataError(
            f"calibration data: item {index} has dtype {images.dtype}; pass images "
            "preprocessed to float as the model expects them"
        )
    found = first_nonfinite(images)
    if found is not None:
        raise DataError(
            f"calibration data: item {index} holds {found}; clean the images or the "
            "preprocessing"
        )
    return images.detach()


def _describe(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {list(item.shape)}"
    if isinstance(item, list | tuple):
        parts = ", ".join(type(part).__name__ for part in item)
        return f"a {type(item).__name__} of ({parts})"
    return f"a {type(item).__name__}"
