"""A network with the images that calibrate and judge it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cora_plugin.compare.rows import Row, judge
from cora_plugin.outputs import in_batches


@dataclass(frozen=True)
class Task:
    """A float network, its inputs [N, C, H, W] and the right classes of the tests.

    `labels` holds for each test image the classes that are right; None: not known.
    """

    name: str
    net: nn.Module
    calibration: Tensor
    test: Tensor
    labels: Sequence[Collection[int]] | Tensor | None = None

    def loader(self, batch_size: int = 16) -> "DataLoader[tuple[Tensor, ...]]":
        """The calibration images as `(image, target)`; the targets say nothing."""
        targets = torch.zeros(len(self.calibration), dtype=torch.long)
        data = TensorDataset(self.calibration, targets)
        return DataLoader(data, batch_size=batch_size)

    @torch.no_grad()
    def float_outputs(self, inputs: Tensor) -> Tensor:
        """Outputs of the float network [N, classes]."""
        return in_batches(self.net, inputs)

    @cached_property
    def reference(self) -> Tensor:
        """Outputs of the float network for the test images."""
        return self.float_outputs(self.test)

    def judge(self, outputs: Tensor, **about: Any) -> Row:
        """The row of a model by its outputs for the test images; see `Row`."""
        return judge(self.reference, outputs, self.labels, model=self.name, **about)
