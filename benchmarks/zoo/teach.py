"""Trains a network of `zoo.jobs`: `python -m zoo.teach vit`.

Minutes on one core. The weights are stored in float16 beside this file.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from zoo.characters import passages
from zoo.jobs import HERE, TAUGHT, fashion

BATCH = 128
RATE = 2e-3


@dataclass(frozen=True)
class Lesson:
    """What a network learns: inputs of a part of the data, what is true of them.

    `loss` takes outputs and truth.
    """

    data: Callable[[str], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    epochs: int


def _pictures(part: str) -> tuple[Tensor, Tensor]:
    images, _ = fashion(part, 60_000)
    return images, images


def _clothes(part: str) -> tuple[Tensor, Tensor]:
    return fashion(part, 60_000)


def _text(part: str) -> tuple[Tensor, Tensor]:
    return passages(part, 32_000 if part == "train" else 1_000)


def _next(logits: Tensor, truth: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), truth.flatten())


LESSONS = {
    "autoencoder": Lesson(_pictures, functional.mse_loss, epochs=3),
    "vit": Lesson(_clothes, functional.cross_entropy, epochs=2),
    "text": Lesson(_text, _next, epochs=3),
}
"""By the network's name."""


def main() -> None:
    """Train, test, and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(LESSONS))
    parser.add_argument("--epochs", type=int, help="default: by the network")
    flags = parser.parse_args()
    torch.manual_seed(0)
    lesson = LESSONS[flags.network]
    net = TAUGHT[flags.network]()
    train(net, lesson, flags.epochs or lesson.epochs)
    inputs, truth = lesson.data("test")
    with torch.no_grad():
        outputs = torch.cat([net(part) for part in inputs.split(500)])
    print(f"loss on the test data: {float(lesson.loss(outputs, truth)):.5f}")
    state = {name: value.half() for name, value in net.state_dict().items()}
    torch.save(state, HERE / f"{flags.network}.pt")


def train(net: nn.Module, lesson: Lesson, epochs: int) -> None:
    """Train by Adam and one cycle; in evaluation mode after."""
    inputs, truth = lesson.data("train")
    optimizer: Any = torch.optim.AdamW(net.parameters(), RATE)
    steps = epochs * (len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    net.train()
    with tqdm(total=steps, disable=None) as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(BATCH)[: steps // epochs]:
                loss = lesson.loss(net(inputs[chosen]), truth[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    net.eval()


if __name__ == "__main__":
    main()
