"""Fashion-MNIST from Debian's dataset-fashion-mnist."""

import gzip

import numpy as np
import torch
from torch import Tensor

from zoo.root import fetched


def fashion_mnist(part: str = "test") -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 1, 28, 28], and labels, int64 [N].

    Args:
        part: "train" (60,000 images) or "test" (10,000).
    """
    stem = {"train": "train", "test": "t10k"}[part]
    images = _read(f"{stem}-images-idx3-ubyte.gz", header=16)
    labels = _read(f"{stem}-labels-idx1-ubyte.gz", header=8)
    return images.view(-1, 1, 28, 28), labels.long()


def _read(name: str, header: int) -> Tensor:
    path = fetched(f"deb/usr/share/datasets/fashion-mnist/{name}")
    with gzip.open(path) as file:
        return torch.from_numpy(
            np.frombuffer(file.read(), np.uint8, offset=header).copy()
        )
