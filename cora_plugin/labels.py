"""Whether float weights are a reference at all, by labels that the loader has.

A network that was trained while it was quantized keeps float weights that nobody ever
ran: nearer to them may be worse. Where the quantized model is right more often than
they are, the labels judge every step.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.exact import exact
from cora_plugin.batches import samples
from cora_plugin.host import Host
from cora_plugin.outputs import Batch, Outputs

log = logging.getLogger(__name__)

ENOUGH = 256
"""Labelled images that are looked at, at most."""

CLEAR = 2.0
"""A difference of so many standard errors is beyond what chance explains."""

LEAST = 0.02
"""A smaller difference of top-1 is of no account."""


class Labelled:
    """The first labelled images, and how often models are right about them.

    Args:
        host: The prepared host.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._batches: list[tuple[Batch, Tensor]] = []
        self._seen = 0

    def add(self, item: Any, batch: Batch) -> None:
        """Keep a batch, if its item has labels and there are not enough yet."""
        labels = labels_of(item, batch)
        if labels is not None and self._seen < ENOUGH / processes.count():
            self._batches.append((batch, labels))
            self._seen += len(labels)

    @torch.no_grad()
    def right(self) -> Tensor:
        """Whether the model, as it is, is right, image by image of all processes, [N].

        Raises:
            _NoClassesError: Outputs are no logits of the classes.
        """
        try:
            own = [
                _right(self._host.run(batch), labels) for batch, labels in self._batches
            ]
        except _NoClassesError:
            own = None
        parts = processes.gathered("labelled", own)
        if any(part is None for part in parts):
            raise _NoClassesError
        return torch.cat([each for part in parts for each in part or ()])

    @property
    def doubt(self) -> str | None:
        """What speaks against the float weights; None: nothing."""
        # Labels that are all the same tell nothing: loaders make them up.
        own = {int(e) for _, labels in self._batches for e in labels.unique()}
        if len(set().union(*processes.gathered("labels", own))) < 2:
            return None
        try:
            quantized = exact(self.right())
            with self._host.acting(quantized=False):
                floats = exact(self.right())
        except _NoClassesError:
            return None
        gain = quantized - floats
        error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 1.0
        mean = float(gain.mean())
        if mean <= max(CLEAR * error, LEAST):
            return None
        return (
            f"the quantized model is right on {float(quantized.mean()):.0%} of "
            f"{len(gain)} labelled images and its float weights on "
            f"{float(floats.mean()):.0%}: as after training with quantization, they "
            "are no reference, and steps have to raise top-1 on these images clearly. "
            "metric_fn= judges by a measure of your own"
        )


class _NoClassesError(Exception):
    """The outputs are no logits of the labels' classes."""


def labels_of(item: Any, batch: Batch) -> Tensor | None:
    """Integer labels [N] beside a loader's images; None: there are none."""
    if not isinstance(item, tuple | list) or len(item) < 2:
        return None
    labels = item[1]
    if not isinstance(labels, Tensor) or labels.ndim != 1 or not len(labels):
        return None
    if labels.is_floating_point() or labels.dtype is torch.bool:
        return None
    return labels if len(labels) == samples(batch) else None


def _right(outputs: Outputs, labels: Tensor) -> Tensor:
    values: Sequence[Tensor] = list(outputs.values())
    first = values[0]
    if len(values) != 1 or first.ndim != 2 or len(first) != len(labels):
        raise _NoClassesError
    if first.shape[1] < 2 or int(labels.max()) >= first.shape[1]:
        raise _NoClassesError
    return first.argmax(1).cpu() == labels.cpu()
