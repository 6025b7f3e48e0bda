"""Judges every step on held-out images and takes back what does not help."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cora_plugin.divergence import Divergence, divergence, outputs
from cora_plugin.layer import Correction, Host
from cora_plugin.report import Step

log = logging.getLogger(__name__)


class Guard:
    """Holds a model to its float original while corrections are tried on it.

    `now` is the model's divergence, `before` what it was without a correction, `kept`
    the correction that stands, and `steps` what was tried.

    Args:
        host: The prepared host.
        held_out: Images that judge, in batches.
    """

    def __init__(self, host: Host, held_out: Sequence[Tensor]) -> None:
        self._host = host
        self._held_out = held_out
        with torch.no_grad(), host.float_model():
            self._reference = outputs(host, held_out)
        self.images = len(self._reference)
        self.before = self.now = self._measure()
        self.kept = Correction()
        self.steps: list[Step] = []

    def _measure(self) -> Divergence:
        return divergence(self._reference, outputs(self._host, self._held_out))

    def trial(
        self,
        weights: Mapping[str, Tensor],
        shifts: Mapping[str, Tensor] | None = None,
    ) -> Divergence:
        """The divergence with other weights and shifts, which do not stay."""
        with self._host.weights(weights, shifts):
            return self._measure()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the model carries no correction; after an error it is left so."""
        self._host.remove()
        yield
        self._host.insert(self.kept)

    def step(self, name: str, correction: Correction, ties: bool = False) -> bool:
        """Put a correction in the place of the one that stands, if it is better.

        Args:
            name: What the report calls it.
            correction: The whole correction, with what is kept of those before.
            ties: Whether an equal divergence is good enough.

        Returns:
            Whether it stands now. After an error none does.
        """
        host, before = self._host, self.now
        try:
            host.remove()
            host.insert(correction)
            after = self._measure()
            better = after.kl <= before.kl if ties else after.kl < before.kl
            if not better:
                host.remove()
                host.insert(self.kept)
        except BaseException:
            host.remove()
            raise
        self.steps.append(Step(name, before, after, better))
        if better:
            self.kept, self.now = correction, after
        else:
            log.warning(
                "%s: taken back, for on %d held-out images the KL divergence went from "
                "%.4g to %.4g",
                name,
                self.images,
                before.kl,
                after.kl,
            )
        return better
