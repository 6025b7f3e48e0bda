"""The benchmarks' networks with the images that calibrate and test them."""

import torch
from zoo import MODELS, NETWORKS, PREPROCESS, fashion_mnist, images, photos, split

from cora_plugin.compare.task import Task

FASHION_CALIBRATION = 512


def load(name: str) -> Task:
    """Load a network of the zoo and its data (after `benchmarks/zoo/fetch.sh`)."""
    prepare, net = PREPROCESS[name], MODELS[name]()
    # Convolutions on the CPU are up to twice as fast with channels last.
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if name in NETWORKS:
        train, _ = fashion_mnist("train")
        test, labels = fashion_mnist("test")
        return Task(
            name,
            net,
            prepare(train[:FASHION_CALIBRATION]),
            prepare(test),
            labels,
        )
    calibration, test_photos = split(photos())
    return Task(
        name,
        net,
        prepare(images(calibration, name)),
        prepare(images(test_photos, name)),
        [photo.labels for photo in test_photos],
    )
