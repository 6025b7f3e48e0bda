"""The network and the images that a learning search works with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cora_plugin.adapters import Factors
from cora_plugin.adapters.exact import exact
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.outputs import Outputs, joined


class Network:
    """Runs a quantized network for a search, and counts how much.

    `iterations` is the number of times that weights were tried, and `used_images` has
    the indices of the images that were run. A search that trains the factors leaves
    them in `trained`, by layer.

    Args:
        host: The prepared host.
        layers: The layers whose ranks are wanted, pinned ones included.
        pinned: Ranks by layer that are not the search's to choose.
        factors: A layer's residual, factored.
        images: The images, each [n, …].
        objective: What "near to the float model" means.
    """

    def __init__(
        self,
        host: Host,
        layers: Sequence[QuantizedLayer],
        pinned: Mapping[str, int],
        factors: Callable[[QuantizedLayer], Factors],
        images: Sequence[Tensor],
        objective: Objective,
    ) -> None:
        self._host = host
        self._images = images
        self.layers = layers
        self.pinned = pinned
        self.factors = factors
        self.trained: dict[str, Factors] = {}
        self.objective = objective
        self.iterations = 0
        self.used_images: set[int] = set()

    @property
    def images(self) -> int:
        """Number of images there are."""
        return len(self._images)

    @property
    def brightness(self) -> float:
        """The sum of all images' values, to tell one set of images from another."""
        return sum(float(exact(image).sum()) for image in self._images)

    @contextmanager
    def weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Try weights, as `Host.acting` does."""
        self.iterations += 1
        with self._host.acting(values):
            yield

    def run(self, images: Sequence[int]) -> Outputs:
        """The outputs for some of the images, by index."""
        self.used_images.update(images)
        return self._host.run(torch.stack([self._images[i] for i in images]))

    @torch.no_grad()
    def float_outputs(self, images: Sequence[int], batch_size: int) -> Outputs:
        """The float model's outputs for some of the images."""
        parts = [
            images[start : start + batch_size]
            for start in range(0, len(images), batch_size)
        ]
        with self._host.acting(quantized=False):
            return joined([self.run(part) for part in parts])
