"""A network that costs little and answers for every pixel: outputs are its memory."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cora_plugin.compare.task import Task

CLASSES = 21


class Segmenter(nn.Module):
    """[N, 3, H, W] -> [N, 21, H, W], computed at an eighth of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 16, 3, 4, 1)
        self.two = nn.Conv2d(16, 16, 3, 2, 1)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes of every pixel."""
        small = self.head(self.two(self.one(x).relu()).relu())
        logits = functional.interpolate(small, size=x.shape[2:], mode="bilinear")
        return 10 * logits


def dense(side: int, images: int) -> Task:
    """The network with random images of `side` pixels, in batches of four.

    An image's outputs are 21 · side² · 4 bytes.
    """
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Segmenter().eval()
    pictures = torch.randn(images, 3, side, side, generator=random)
    return Task(f"dense{side}", net, pictures, pictures[:4])
