"""Trains a network of the zoo on Fashion-MNIST: `python -m zoo.train mobilenet FILE`.

On a GPU, where there is one (minutes), else on the CPU (hours). The weights are those
of the last step, stored in float16.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from zoo.fashion_mnist import fashion_mnist
from zoo.models import NETWORKS, PREPROCESS

BATCH = 128
RATE = 0.1
DECAY = 4e-5
SHIFT = 2

Prepare = Callable[[Tensor], Tensor]


def main() -> None:
    """Train, test, and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("file", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(flags.seed)
    net, prepare = NETWORKS[flags.network]().to(device), PREPROCESS[flags.network]
    train(net, prepare, flags.epochs, device)
    print(f"top-1 on the test images: {tested(net, prepare, device):.2%}")
    state = net.cpu().state_dict()
    torch.save({n: _stored(value) for n, value in state.items()}, flags.file)


def _stored(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def train(net: nn.Module, prepare: Prepare, epochs: int, device: torch.device) -> None:
    """Train on the 60,000 images, mirrored and shifted, by SGD and one cycle."""
    images, labels = (each.to(device) for each in fashion_mnist("train"))
    # Scales and shifts of norms are not pulled towards zero.
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, RATE, momentum=0.9, nesterov=True)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    net.train()
    with tqdm(total=steps, disable=None) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images)).to(device)
            for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
                batch = changed(prepare(images[chosen]))
                loss = functional.cross_entropy(net(batch), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


def changed(images: Tensor) -> Tensor:
    """Images [N, 1, H, W], half of them mirrored, all shifted by up to `SHIFT`."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(mirrored, images.flip(3), images)
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,)).tolist()
    return images.roll((down, right), (2, 3))


@torch.no_grad()
def tested(net: nn.Module, prepare: Prepare, device: torch.device) -> float:
    """Top-1 on the 10,000 test images."""
    images, labels = (each.to(device) for each in fashion_mnist("test"))
    net.eval()
    right = sum(
        int((net(prepare(some)).argmax(1) == truth).sum())
        for some, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(images)


if __name__ == "__main__":
    main()
