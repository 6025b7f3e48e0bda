"""The benchmarks' ResNet-20 for Fashion-MNIST, and images much like clothes."""

import sys
from pathlib import Path

import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


def resnet():
    """The trained network, whose weights are in the repository."""
    from zoo.models import fashion

    return fashion()


def images(count, seed=0):
    """Smooth shapes on black, in the network's units."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 5, generator=random)
    smooth = functional.interpolate(coarse, (28, 28), mode="bicubic")
    return (smooth.clamp(0.35, 1) - 0.35 - 0.2860) / 0.3530


def batches(count, size=32, seed=0):
    return [
        (each, torch.zeros(len(each), dtype=torch.long))
        for each in images(count * size, seed).split(size)
    ]
