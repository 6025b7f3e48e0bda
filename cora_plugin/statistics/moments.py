"""Second moments of a layer's unfolded quantized input, streamed."""

import math

import torch
from torch import Tensor

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.operation import patches
from cora_plugin.layer import QuantizedLayer

CHUNK = 2**23
"""Largest number of unfolded values that exist at a time: 64 MiB in float64."""


class InputMoments:
    """Running moments of a layer's unfolded quantized input `u`, in float64.

    `kind` is "second" for `E[u uᵀ]`, [g, b, k/b, k/b]; "square" for `E[u²]` or
    "absolute" for `E|u|`, [g, k].

    Args:
        layer: The layer.
        kind: Which moment.
        max_size: Largest k kept as one block; above it, blocks of whole channels.
        positions: Output positions an image kept at most, 0 for all; which ones rotates
            with the batches. Never more than k, as many as an image can tell apart.
    """

    def __init__(
        self, layer: QuantizedLayer, kind: str, max_size: int, positions: int
    ) -> None:
        self._layer = layer
        self._kind = kind
        self._positions = min(positions, layer.columns)
        self._turn = 0
        self.rows = 0
        self.outputs = 0
        groups, columns = layer.operation.groups, layer.columns
        if kind == "second":
            self._blocks = _block_count(layer, max_size)
            size = columns // self._blocks
            shape = [groups, self._blocks, size, size]
        else:
            shape = [groups, columns]
        self._sum = torch.zeros(shape, dtype=torch.float64, device=layer.weight.device)

    @torch.no_grad()
    def update(self, x: Tensor, output: Tensor) -> None:
        """Add the quantized input `x` of one run of the layer, with its output."""
        operation, kernel = self._layer.operation, self._layer.kernel
        sizes = list(output.shape[2:])
        if not operation.dimensions:
            sizes = [math.prod(output.shape[1:-1])]
        outputs, axes = math.prod(sizes), len(sizes)
        self.outputs = max(self.outputs, outputs)
        width = operation.groups * self._layer.columns  # values at one position
        if self._positions:
            step = math.ceil((outputs / self._positions) ** (1 / axes))
            starts = [self._turn]
        else:
            # All positions, as sparse grids of which the windows of each one fit.
            step = math.ceil((outputs * width / CHUNK) ** (1 / axes))
            step = min(step, max(sizes))
            starts = list(range(math.prod(min(step, size) for size in sizes)))
        kept = math.prod(-(-size // step) for size in sizes)
        for part in x.split(max(1, CHUNK // (width * kept))):
            for start in starts:
                columns = patches(part, operation, kernel, step, start, torch.float64)
                self._add(columns)
        self._turn += 1

    def _add(self, columns: Tensor) -> None:
        """Add columns [g, p, k], float64."""
        self.rows += columns.shape[1]
        if self._kind == "absolute":
            self._sum += columns.abs().sum(1)
        elif self._kind == "square":
            self._sum += columns.square().sum(1)
        else:
            groups, rows, _ = columns.shape
            split = columns.mT.reshape(groups, self._blocks, -1, rows)
            self._sum += split @ split.mT

    def mean(self) -> Tensor:
        """The moment over all rows seen.

        Raises:
            CoRaError: Calibration never reached the layer.
        """
        if not self.rows:
            raise CoRaError(
                f"{self._layer.name}: calibration never reached this layer; calibrate "
                f"with data that uses it, or leave it alone with "
                f"ranks={{'{self._layer.name}': 0}}"
            )
        return self._sum / self.rows


def _block_count(layer: QuantizedLayer, max_size: int) -> int:
    """Fewest equal blocks of whole channels whose size is at most `max_size`."""
    channels = layer.weight.shape[1]
    for blocks in range(1, channels + 1):
        if channels % blocks == 0 and layer.columns // blocks <= max_size:
            return blocks
    return channels
