"""Second moments of a layer's unfolded quantized input, streamed."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import DataError
from cora_plugin.adapters.exact import exact, exact_device
from cora_plugin.adapters.operation import patches
from cora_plugin.layer import QuantizedLayer

CHUNK = 2**23
"""Largest number of unfolded values that exist at a time: 64 MiB in float64."""


class InputMoments:
    """Running moments of a layer's unfolded quantized input `u`, in float64.

    `moment` is "second" for `E[u uᵀ]`, [g, b, k/b, k/b]; "square" for `E[u²]` or
    "absolute" for `E|u|`, [g, k].

    Args:
        layer: The layer.
        moment: Which moment.
        max_size: Largest k kept as one block; above it, blocks of whole channels.
        positions: How many output positions an image to keep at most, 0 for all; others
            with each batch. Never more than k are kept.
    """

    def __init__(
        self, layer: QuantizedLayer, moment: str, max_size: int, positions: int
    ) -> None:
        self._layer = layer
        self._moment = moment
        self._positions = min(positions, layer.columns)
        self._turn = 0
        self.rows = 0
        groups, columns = layer.operation.groups, layer.columns
        if moment == "second":
            self._blocks = block_count(layer, max_size)
            size = columns // self._blocks
            shape = [groups, self._blocks, size, size]
        else:
            shape = [groups, columns]
        device = exact_device(layer.weight.device)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: Tensor, output: Tensor) -> None:
        """Add the quantized input `x` of one run of the layer, with its output."""
        for columns in sampled_columns(
            self._layer, x, output, self._positions, self._turn
        ):
            self._add(columns)
        self._turn += 1

    def _add(self, columns: Tensor) -> None:
        """Add columns [g, p, k], float64."""
        self.rows += columns.shape[1]
        if self._moment == "absolute":
            self._sum += columns.abs().sum(1)
        elif self._moment == "square":
            self._sum += columns.square().sum(1)
        else:
            groups, rows, _ = columns.shape
            split = columns.mT.reshape(groups, self._blocks, -1, rows)
            self._sum += split @ split.mT

    def pool(self) -> None:
        """Add what other processes have seen."""
        what = f"{self._moment} moments of {self._layer.name}"
        (rows,) = processes.add_up(what, [self._sum], [self.rows])
        self.rows = int(rows)

    def mean(self) -> Tensor:
        """The moment over all rows seen.

        Raises:
            DataError: Calibration never reached the layer.
        """
        if not self.rows:
            raise DataError(
                f"{self._layer.name}: calibration never reached this layer; calibrate "
                f"with data that uses it, or leave it alone with "
                f"ranks={{'{self._layer.name}': 0}}"
            )
        return self._sum / self.rows


class InputMean:
    """Running mean of a layer's unfolded quantized input, `E[u]`, [g, k] in float64."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self._layer = layer
        shape = layer.operation.groups, layer.columns
        device = exact_device(layer.weight.device)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._images = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the quantized input of one run, [N, n, *size] or [N, …, n]."""
        # Unfolding is linear, so one mean image does for the whole batch. The mean of
        # a batch is taken in its own precision: a copy in float64 is slow.
        image = exact(x.mean(0, keepdim=True))
        columns = patches(image, self._layer.operation, self._layer.kernel)
        self._sum += len(x) * columns.mean(1)
        self._images += len(x)

    def pool(self) -> None:
        """Add what other processes have seen."""
        what = f"means of {self._layer.name}"
        (images,) = processes.add_up(what, [self._sum], [self._images])
        self._images = int(images)

    def mean(self) -> Tensor:
        """The mean over all images and positions seen; at least one must have been."""
        return self._sum / self._images


def sampled_columns(
    layer: QuantizedLayer, x: Tensor, output: Tensor, positions: int, turn: int
) -> Iterator[Tensor]:
    """Unfold a layer's input at some output positions, in parts that fit in memory.

    Args:
        layer: The layer.
        x: Its input.
        output: Its output, of which only the shape is used.
        positions: Output positions an image, at most; 0 for all.
        turn: Selects the grid of positions; may count up without end.

    Yields:
        Columns [g, p, k] in float64.
    """
    operation, kernel = layer.operation, layer.kernel
    sizes = _sizes(layer, output)
    outputs, axes = math.prod(sizes), len(sizes)
    width = operation.groups * layer.columns  # values at one position
    if positions:
        step = math.ceil((outputs / positions) ** (1 / axes))
        # What a kernel's weight of a transposed convolution meets depends on where in
        # the stride an output is: grids have to hold positions of every kind.
        while operation.transposed and any(
            math.gcd(step, stride) > 1 for stride in operation.stride
        ):
            step += 1
        starts = [turn]
    else:
        # All positions, as sparse grids of which the windows of each one fit.
        step = math.ceil((outputs * width / CHUNK) ** (1 / axes))
        step = min(step, max(sizes))
        starts = list(range(math.prod(min(step, size) for size in sizes)))
    kept = math.prod(-(-size // step) for size in sizes)
    for part in x.split(max(1, CHUNK // (width * kept))):
        for start in starts:
            yield patches(part, operation, kernel, step, start, torch.float64)


def _sizes(layer: QuantizedLayer, output: Tensor) -> list[int]:
    if layer.operation.dimensions:
        return list(output.shape[2:])
    return [math.prod(output.shape[1:-1])]


def block_count(layer: QuantizedLayer, max_size: int) -> int:
    """Fewest equal blocks of whole channels whose size is at most `max_size`."""
    channels = layer.weight.shape[1]
    for blocks in range(1, channels + 1):
        if channels % blocks == 0 and layer.columns // blocks <= max_size:
            return blocks
    return channels
