"""Small nets for images, each with one kind of layer that may carry an adapter."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn


class KindNet(nn.Module):
    """A stem, the layer in question, and a head.

    Args:
        layer: Takes 12 channels, and gives as many.
        shape: Brings the stem's output [N, 12, 8, 8] to the layer's input.
        calls: How often the layer runs.
    """

    def __init__(
        self, layer: nn.Module, shape: Callable[[Tensor], Tensor], calls: int = 1
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.layer = layer
        self.head = nn.Linear(12, 10)
        self._shaped = shape
        self._calls = calls

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 16, 16] to logits [N, 10]."""
        y: Tensor = self._shaped(self.stem(x).relu())
        for _ in range(self._calls):
            y = self._run(y)
        if isinstance(self.layer, nn.Linear):
            y = y.flatten(1, -2).mean(1)
        else:
            y = y.flatten(2).mean(2)
        logits: Tensor = 6 * self.head(y)
        return logits

    def _run(self, y: Tensor) -> Tensor:
        answer: Tensor = self.layer(y)
        return answer.relu()


def _image(x: Tensor) -> Tensor:
    return x


def _line(x: Tensor) -> Tensor:
    return x.flatten(2)


def _volume(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], 2, 4, -1)


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3)).unsqueeze(1)


_CONV = nn.Conv2d
_UP1, _UP, _UP3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor], int]] = {
    "conv1d": (lambda: nn.Conv1d(12, 12, 3, padding=1), _line, 1),
    "conv2d": (lambda: _CONV(12, 12, 3, padding=1), _image, 1),
    "conv3d": (lambda: nn.Conv3d(12, 12, (1, 3, 3), padding=(0, 1, 1)), _volume, 1),
    "1x1": (lambda: _CONV(12, 12, 1), _image, 1),
    "without bias": (lambda: _CONV(12, 12, 3, bias=False), _image, 1),
    "strided": (lambda: _CONV(12, 12, 3, stride=(2, 1), padding=1), _image, 1),
    "dilated": (lambda: _CONV(12, 12, 3, padding=2, dilation=2), _image, 1),
    "grouped": (lambda: _CONV(12, 12, 3, padding=1, groups=3), _image, 1),
    "grouped conv1d": (lambda: nn.Conv1d(12, 12, 3, groups=2), _line, 1),
    "depthwise": (lambda: _CONV(12, 12, 3, padding=1, groups=12), _image, 1),
    "depthwise conv1d": (lambda: nn.Conv1d(12, 12, 5, groups=12), _line, 1),
    "same": (lambda: _CONV(12, 12, (2, 3), padding="same"), _image, 1),
    "reflect": (lambda: _padded("reflect"), _image, 1),
    "replicate": (lambda: _padded("replicate"), _image, 1),
    "circular": (lambda: _padded("circular"), _image, 1),
    "transposed conv1d": (lambda: _UP1(12, 12, 4, stride=2, padding=1), _line, 1),
    "transposed": (lambda: _UP(12, 12, 4, stride=2, padding=1), _image, 1),
    "transposed conv3d": (lambda: _UP3(12, 12, 2, stride=(1, 2, 2)), _volume, 1),
    "output padding": (lambda: _wider(stride=(2, 3), output_padding=1), _image, 1),
    "dilated transposed": (lambda: _wider(dilation=2, padding=5), _image, 1),
    "grouped transposed": (lambda: _wider(stride=2, groups=3), _image, 1),
    "depthwise transposed": (lambda: _wider(stride=2, groups=12), _image, 1),
    "shared transposed": (lambda: _wider(stride=2, padding=2), _image, 2),
    "linear": (lambda: nn.Linear(12, 12), _mean, 1),
    "linear on tokens": (lambda: nn.Linear(12, 12), _tokens, 1),
    "linear on the last axis": (lambda: nn.Linear(12, 12), _last, 1),
    "shared conv": (lambda: _CONV(12, 12, 3, padding=1), _image, 3),
    "shared linear": (lambda: nn.Linear(12, 12), _tokens, 2),
}

KINDS = tuple(_NETS)
"""The kinds of layers by name."""


def _padded(mode: Literal["reflect", "replicate", "circular"]) -> nn.Module:
    return _CONV(12, 12, 3, padding=(1, 2), padding_mode=mode)


def _wider(**settings: Any) -> nn.Module:
    return _UP(12, 12, 3, **settings)


def net_of(kind: str) -> nn.Module:
    """The net of a kind, with random weights that a seed of its own decides."""
    make, shape, calls = _NETS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return KindNet(make(), shape, calls).eval()
