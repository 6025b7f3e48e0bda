"""The benchmarks' networks with the images that calibrate and test them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import MODELS, PREPROCESS, fashion_mnist, images, photos, split

FASHION_CALIBRATION = 512


@dataclass(frozen=True)
class Task:
    """A float network, its inputs [N, C, H, W] and the right classes of the tests."""

    name: str
    net: nn.Module
    calibration: Tensor
    test: Tensor
    labels: list[tuple[int, ...]]

    def loader(self, batch_size: int = 16) -> "DataLoader[tuple[Tensor, ...]]":
        """The calibration images as `(image, target)`; the targets say nothing."""
        targets = torch.zeros(len(self.calibration), dtype=torch.long)
        data = TensorDataset(self.calibration, targets)
        return DataLoader(data, batch_size=batch_size)

    @torch.no_grad()
    def float_logits(self, inputs: Tensor) -> Tensor:
        """Logits of the float network."""
        return torch.cat([self.net(batch) for batch in inputs.split(32)])

    def top1(self, logits: Tensor) -> float:
        """Share of the test images whose first class is a right one."""
        pairs = zip(logits.argmax(1).tolist(), self.labels, strict=True)
        return sum(guess in right for guess, right in pairs) / len(self.labels)


def load(name: str) -> Task:
    """Load a network of the zoo and its data (after `benchmarks/zoo/fetch.sh`)."""
    prepare, net = PREPROCESS[name], MODELS[name]()
    # Convolutions on the CPU are up to twice as fast with channels last.
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if name == "fashion":
        train, _ = fashion_mnist("train")
        test, labels = fashion_mnist("test")
        return Task(
            name,
            net,
            prepare(train[:FASHION_CALIBRATION]),
            prepare(test),
            [(label,) for label in labels.tolist()],
        )
    calibration, test_photos = split(photos())
    return Task(
        name,
        net,
        prepare(images(calibration, name)),
        prepare(images(test_photos, name)),
        [photo.labels for photo in test_photos],
    )
