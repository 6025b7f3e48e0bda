"""The network and the images that a learning search works with."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters import Factors
from cora_plugin.adapters.exact import exact
from cora_plugin.batches import Units, tensors
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.outputs import Outputs
from cora_plugin.reference import References
from cora_plugin.teacher import Teacher


class Network:
    """Runs a quantized network for a search, and counts how much.

    `iterations` is the number of times that weights were tried, and `used_images` has
    the indices of the images that were run, by all processes. A search that trains the
    factors leaves them in `trained`, by layer.

    Args:
        host: The prepared host.
        layers: The layers whose ranks are wanted, pinned ones included.
        pinned: Ranks by layer that are not the search's to choose.
        factors: A layer's residual, factored.
        images: The images, in pieces that run together or alone.
        objective: What "near to the float model" means.
        teacher: As for `References`.
    """

    def __init__(
        self,
        host: Host,
        layers: Sequence[QuantizedLayer],
        pinned: Mapping[str, int],
        factors: Callable[[QuantizedLayer], Factors],
        images: Units,
        objective: Objective,
        teacher: Teacher | None = None,
    ) -> None:
        self._host = host
        self._images = images
        self._references = References(host, images, teacher)
        self.layers = layers
        self.pinned = pinned
        self.factors = factors
        self.trained: dict[str, Factors] = {}
        self.objective = objective
        self.iterations = 0
        self.used_images: set[int] = set()

    @property
    def images(self) -> int:
        """Number of pieces that the images are in, one each where that can be."""
        return len(self._images)

    @property
    def brightness(self) -> float:
        """The sum of all images' values, to tell one set of images from another."""
        values = (value for unit in self._images for value in tensors(unit))
        return sum(float(exact(value).sum()) for value in values)

    @contextmanager
    def weights(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Try weights, as `Host.acting` does."""
        self.iterations += 1
        with self._host.acting(values):
            yield

    def groups(self, images: Sequence[int]) -> list[list[int]]:
        """This process's share of some images, by index, in groups to run together."""
        self.used_images.update(images)
        return self._images.groups(processes.mine(images), len(images))

    def steps(self, size: int) -> int:
        """How many pieces hold about so many images, at least one."""
        each = self._images.rows / len(self._images)
        return max(1, round(size / each))

    def run(self, group: Sequence[int]) -> Outputs:
        """The outputs for a group of images."""
        return self._host.run(self._images.batch(group))

    def float_outputs(self, group: Sequence[int]) -> Outputs:
        """The float model's outputs for a group of images."""
        return self._references(group)
