"""Judges a model in training on images that it is not trained on."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cora_plugin import processes
from cora_plugin.adapters.errors import DataError
from cora_plugin.adapters.exact import exact
from cora_plugin.host import TrainableHost
from cora_plugin.items import check_loader, not_running
from cora_plugin.objective import Distance, Objective, averaged, check_shapes
from cora_plugin.outputs import Outputs, device_of, joined, moved, only, run

HELD_OUT = "held-out data"

IGNORED = -100
"""The label that `cross_entropy` leaves out."""


@dataclass(frozen=True)
class Batch:
    """Images, and labels [N] where there are any."""

    images: Any
    labels: Tensor | None


def batch_of(item: Any, what: str, labelled: bool) -> Batch:
    """What a loader yielded: images alone, or first in a tuple with labels.

    Raises:
        DataError: It is neither, or labels are wanted and there are none.
    """
    images = item[0] if isinstance(item, list | tuple) and item else item
    given = item[1] if isinstance(item, list | tuple) and len(item) > 1 else None
    labels = given if isinstance(given, Tensor) else None
    if not isinstance(images, Tensor) or images.ndim < 2:
        raise DataError(
            f"{what}: a batch is a {type(item).__name__}; the loader should yield "
            "images [N, …], alone or first in a tuple such as (images, labels)"
        )
    if labelled and (labels is None or labels.is_floating_point()):
        raise DataError(
            f"{what}: batches have no labels of integers, which the loss is to use; "
            "yield (images, labels), or pass labels=0"
        )
    return Batch(images, labels)


def losses(
    objective: Objective,
    share: float,
    reference: Outputs,
    outputs: Outputs,
    labels: Tensor | None,
) -> Tensor:
    """The loss of each sample [N]: the distance, and a share of cross-entropy.

    Raises:
        DataError: A label is none of the classes.
    """
    distance = objective.distance(reference, outputs)
    if not share or labels is None:
        return distance
    logits = only(outputs)
    _check_labels(labels, logits.shape[1])
    each = functional.cross_entropy(
        logits, labels.to(logits.device).long(), reduction="none"
    )
    return (1 - share) * distance + share * each.reshape(len(each), -1).mean(1)


def _check_labels(labels: Tensor, classes: int) -> None:
    """On a GPU a wrong one would end the process."""
    wrong = labels[(labels >= classes) | ((labels < 0) & (labels != IGNORED))]
    if wrong.numel():
        raise DataError(
            f"labels: {int(wrong[0])} is none of the {classes} classes that the model "
            f"has; use 0 to {classes - 1}, or {IGNORED} for what is to be left out"
        )


@dataclass(frozen=True)
class Verdict:
    """A model on the held-out images.

    Attributes:
        distance: From the float model.
        losses: The training's loss of each image [N].
        top1: The share of images with the right class; None without labels.
    """

    distance: Distance
    losses: Tensor
    top1: float | None

    @property
    def loss(self) -> float:
        """The mean loss; infinite where it is not a number."""
        mean = float(self.losses.mean())
        return mean if mean == mean else float("inf")


class HeldOut:
    """The held-out images, with the float model's outputs for them.

    Of several processes each has a share of them, or all have the same; they judge
    alike.

    Args:
        loader: Yields batches; walked once, and kept.
        reference: The float model.
        objective: What "near to the float model" means.
        share: The labels' share of the loss.

    Raises:
        DataError: There are no images, or the float model does not run with them.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        reference: nn.Module,
        objective: Objective,
        share: float,
    ) -> None:
        check_loader(loader, what=HELD_OUT)
        self._batches = [batch_of(item, HELD_OUT, share > 0) for item in loader]
        if not self._batches:
            raise DataError(f"{HELD_OUT}: the loader is empty; pass a few batches")
        self._objective, self._share = objective, share
        found = []
        for index, batch in enumerate(self._batches):
            try:
                found.append(on_cpu(answers(reference, batch.images)))
            except Exception as error:  # Of whatever kind the model raises.
                raise not_running(index, batch.images, error, HELD_OUT) from error
        self._reference = joined(found)
        labels = [e.labels for e in self._batches if e.labels is not None]
        whole = len(labels) == len(self._batches)
        self._labels = torch.cat(labels).cpu() if whole else None
        self._shared = processes.count() > 1 and not self._same_everywhere()

    @torch.no_grad()
    def __call__(self, host: TrainableHost) -> Verdict:
        """Judge a model, which must be in evaluation mode.

        Raises:
            ModelError: Its outputs are of other shapes than the float model's.
        """
        outputs = joined([on_cpu(host.run(e.images)) for e in self._batches])
        check_shapes(self._reference, outputs)
        wanted, found = (
            {name: exact(value) for name, value in each.items()}
            for each in (self._reference, outputs)
        )
        each = self._objective.distance(wanted, found)
        distance = averaged(self._objective, each, self._reference, outputs)
        mixed = losses(self._objective, self._share, wanted, found, self._labels)
        return self._of_all(Verdict(distance, mixed, self._top1(outputs)))

    def _same_everywhere(self) -> bool:
        """Whether all processes have the same images, by the float model's outputs."""
        return len({*processes.gathered(HELD_OUT, _checksum(self._reference))}) == 1

    def _of_all(self, mine: Verdict) -> Verdict:
        """The verdict of all processes: the first one's, or that on all shares."""
        if not self._shared:
            return processes.of_first("a verdict", mine)
        parts = processes.gathered("a share of a verdict", mine)
        sizes = [len(part.losses) for part in parts]
        distances = [part.distance for part in parts]
        value = _mean([each.value for each in distances], sizes)
        return Verdict(
            replace(
                mine.distance,
                value=float("inf") if value is None else value,
                agreement=_mean([each.agreement for each in distances], sizes),
            ),
            torch.cat([part.losses for part in parts]),
            _mean([part.top1 for part in parts], sizes),
        )

    def _top1(self, outputs: Outputs) -> float | None:
        if self._labels is None or len(outputs) != 1 or only(outputs).ndim < 2:
            return None
        chosen = only(outputs).argmax(1)
        if chosen.shape != self._labels.shape:
            return None
        return float((chosen == self._labels).double().mean())


def _mean(values: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """The mean over samples, by shares of them; None where a share has none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return sum(a * b for a, b in zip(known, sizes, strict=True)) / sum(sizes)


def _checksum(outputs: Outputs) -> str:
    found = hashlib.sha256()
    for value in outputs.values():
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def answers(reference: nn.Module, images: Any) -> Outputs:
    """The float model's outputs, on its device."""
    return run(reference, images)


def on_cpu(outputs: Outputs) -> Outputs:
    """Outputs off the GPU, where they would add up."""
    found: Outputs = moved(outputs, torch.device("cpu"))
    return found


def beside(outputs: Outputs, model: nn.Module) -> Outputs:
    """Outputs on the device of a model."""
    found: Outputs = moved(outputs, device_of(model))
    return found
