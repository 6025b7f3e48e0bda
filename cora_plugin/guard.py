"""Judges every step on held-out images and undoes those that do not help."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cora_plugin.host import Host
from cora_plugin.layer import Correction
from cora_plugin.objective import Distance, Objective, averaged, distances
from cora_plugin.outputs import Batch, Outputs, joined

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """A step that was judged on the held-out images, and whether it was kept.

    `error` is the standard error of `difference`, from the differences sample by
    sample; None where it is not known.
    """

    name: str
    before: Distance
    after: Distance
    kept: bool
    error: float | None = None

    @property
    def difference(self) -> float:
        """How much the distance grew; below 0 the step helped."""
        return self.after.value - self.before.value


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Distances on held-out images, `held_out` of them: before, after, by step.

    `activations` is the distance with float weights and quantized activations: what
    adapters that restore weights, and nothing else, can reach.
    """

    before: Distance
    after: Distance
    activations: Distance
    steps: tuple[Step, ...]
    held_out: int


class Guard:
    """Tries corrections on a model and keeps those that bring it nearer to float.

    `now` is the model's distance, `before` what it was without a correction, `kept` the
    present correction, and `steps` what was tried.

    Args:
        host: The prepared host.
        held_out: Images that judge, in batches.
        objective: What "near to the float model" means.
    """

    def __init__(
        self, host: Host, held_out: Sequence[Batch], objective: Objective
    ) -> None:
        self._host = host
        self._held_out = held_out
        self._objective = objective
        with host.acting(quantized=False):
            self._reference = self._outputs()
        self.images = len(next(iter(self._reference.values())))
        self.before, self._each = self._measure()
        self.now = self.before
        self.kept = Correction()
        self.steps: list[Step] = []

    @torch.no_grad()
    def _outputs(self) -> Outputs:
        return joined([self._host.run(batch) for batch in self._held_out])

    def _measure(self) -> tuple[Distance, Tensor]:
        """The present distance, and that of each sample [N]."""
        outputs = self._outputs()
        objective, reference = self._objective, self._reference
        each = distances(objective, reference, outputs)
        return averaged(objective, each, reference, outputs), each

    def trial(
        self,
        weights: Mapping[str, Tensor],
        shifts: Mapping[str, Tensor] | None = None,
    ) -> Distance:
        """The distance with other weights and shifts, which do not stay."""
        with self._host.acting(weights, shifts):
            distance, _ = self._measure()
            return distance

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the model carries no correction; after an error it is left so."""
        self._host.correct(Correction())
        yield
        self._host.correct(self.kept)

    def step(self, name: str, correction: Correction, ties: bool = False) -> bool:
        """Replace the present correction, if the new one is better.

        Args:
            name: What the report calls it.
            correction: The whole correction, with what is kept of those before.
            ties: Whether an equal distance is good enough.

        Returns:
            Whether it was kept. If anything fails, the model carries no correction.
        """
        host, before = self._host, self.now
        try:
            host.correct(correction)
            after, each = self._measure()
            value = after.value
            better = value <= before.value if ties else value < before.value
            if not better:
                host.correct(self.kept)
        except BaseException:
            host.correct(Correction())
            raise
        error = standard_error(each - self._each)
        self.steps.append(Step(name, before, after, better, error))
        if better:
            self.kept, self.now = correction, after
            self._each = each
        else:
            log.warning(
                "%s: taken back, for on %d held-out images the model went from %s to "
                "%s away from the float one",
                name,
                self.images,
                before,
                after,
            )
        return better

    def judged(self, activations: Distance) -> Judged:
        """The findings; `activations` as in `Judged`."""
        return Judged(
            before=self.before,
            after=self.now,
            activations=activations,
            steps=tuple(self.steps),
            held_out=self.images,
        )


def standard_error(differences: Tensor) -> float | None:
    """The standard error of the mean of paired differences [N].

    None where it is not known: of a single sample, or where one is not finite.
    """
    if len(differences) < 2 or not torch.isfinite(differences).all():
        return None
    return float(differences.std() / len(differences) ** 0.5)
