"""The network that a search tries weights on, and the images that it may show it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cora_plugin.adapters import Factors
from cora_plugin.layer import Host, QuantizedLayer


class Network:
    """A quantized network for a search to run; it counts what it is asked for.

    `iterations` is the number of times that weights were tried and `shown` the indices
    of the images that were run. A search that trains the factors leaves them in
    `trained`, by layer.

    Args:
        host: The prepared host.
        layers: The layers whose ranks are wanted, pinned ones included.
        pinned: Ranks by layer that are not the search's to choose.
        factors: A layer's residual, factored.
        images: The images, each [n, …].
        unit: What a budget of amount 1 buys, in the unit of the candidates' costs.
    """

    def __init__(
        self,
        host: Host,
        layers: Sequence[QuantizedLayer],
        pinned: Mapping[str, int],
        factors: Callable[[QuantizedLayer], Factors],
        images: Sequence[Tensor],
        unit: float,
    ) -> None:
        self._host = host
        self._images = images
        self.layers = layers
        self.pinned = pinned
        self.factors = factors
        self.trained: dict[str, Factors] = {}
        self.unit = unit
        self.iterations = 0
        self.shown: set[int] = set()

    @property
    def images(self) -> int:
        """Number of images there are to show."""
        return len(self._images)

    @property
    def brightness(self) -> float:
        """The sum of all images' values, which tells one set from another."""
        return sum(float(image.double().sum()) for image in self._images)

    @contextmanager
    def weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Try weights, as `Host.weights` does."""
        self.iterations += 1
        with self._host.weights(values):
            yield

    def run(self, images: Sequence[int]) -> Tensor:
        """The output for some of the images, by index."""
        self.shown.update(images)
        return self._host.run(torch.stack([self._images[i] for i in images]))

    @torch.no_grad()
    def float_outputs(self, images: Sequence[int], batch_size: int) -> Tensor:
        """The float model's outputs for some of the images, [N, classes, …]."""
        parts = [
            images[start : start + batch_size]
            for start in range(0, len(images), batch_size)
        ]
        with self._host.float_model():
            return torch.cat([self.run(part) for part in parts])
