"""The benchmarks' networks with the images that calibrate and test them."""

import torch
from torch import Tensor
from zoo import MODELS, NETWORKS, PREPROCESS, fashion_mnist, images, photos, split

from cora_plugin.compare.task import Task

FASHION_CALIBRATION = 512
SHARE = 0.75
"""Of the photos, what a seed other than 0 draws."""


def load(name: str, seed: int = 0) -> Task:
    """Load a network of the zoo and its data (after `benchmarks/zoo/fetch.sh`).

    Args:
        name: Of the network.
        seed: Draws other calibration images, of Fashion-MNIST as many, of the photos
            `SHARE`; 0: the first of Fashion-MNIST, all photos. The tests are the same.
    """
    prepare, net = PREPROCESS[name], MODELS[name]()
    # Convolutions on the CPU are up to twice as fast with channels last.
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if name in NETWORKS:
        train, _ = fashion_mnist("train")
        test, labels = fashion_mnist("test")
        return Task(
            name,
            net,
            prepare(train[_drawn(len(train), FASHION_CALIBRATION, seed)]),
            prepare(test),
            labels,
        )
    calibration, test_photos = split(photos())
    share = SHARE if seed else 1.0
    drawn = _drawn(len(calibration), int(share * len(calibration)), seed)
    return Task(
        name,
        net,
        prepare(images([calibration[index] for index in drawn], name)),
        prepare(images(test_photos, name)),
        [photo.labels for photo in test_photos],
    )


def _drawn(available: int, wanted: int, seed: int) -> Tensor:
    """Indices of calibration images, in their order."""
    if seed == 0:
        return torch.arange(wanted)
    random = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=random)[:wanted].sort().values
