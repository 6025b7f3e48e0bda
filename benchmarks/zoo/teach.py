"""Trains a network of `zoo.jobs` on Fashion-MNIST: `python -m zoo.teach autoencoder`.

Minutes on one core. The weights are stored in float16 beside this file.
"""

import argparse
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from zoo.jobs import HERE, TAUGHT, fashion

BATCH = 128
RATE = 2e-3


def main() -> None:
    """Train, test, and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=sorted(TAUGHT))
    parser.add_argument("--epochs", type=int, default=3)
    flags = parser.parse_args()
    torch.manual_seed(0)
    net = TAUGHT[flags.network]()
    train(net, flags.epochs)
    judge, _ = fashion("test", 10_000)
    with torch.no_grad():
        outputs = torch.cat([net(part) for part in judge.split(500)])
    print(f"squared error: {float(functional.mse_loss(outputs, judge)):.5f}")
    state = {name: value.half() for name, value in net.state_dict().items()}
    torch.save(state, HERE / f"{flags.network}.pt")


def train(net: nn.Module, epochs: int) -> None:
    """Train on the 60,000 images by Adam and one cycle; in evaluation mode after."""
    images, _ = fashion("train", 60_000)
    optimizer: Any = torch.optim.AdamW(net.parameters(), RATE)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    net.train()
    with tqdm(total=steps, disable=None) as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(BATCH)[: steps // epochs]:
                batch = images[chosen]
                loss = functional.mse_loss(net(batch), batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    net.eval()


if __name__ == "__main__":
    main()
