"""Counts weights that change their integer codes, and those that go back and forth."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cora_plugin.host import Latent

NEAR = 0.05
"""A weight is near a transition point within so many of its steps."""

NEVER = -(2**30)
"""The step at which a weight that never did has changed."""


class Transitions:
    """The codes of all latent weights, step by step.

    Only codes are kept between steps, a byte a weight; with a window also the code
    before the last change, and when it and the last return were.

    Args:
        latents: The weights; none is named twice.
        window: A weight oscillates that changes its code and goes back within so many
            steps; 0: not watched.
    """

    def __init__(self, latents: Sequence[Latent], window: int = 0) -> None:
        self.latents = latents
        self.window = window
        self.sizes = [each.weight.numel() for each in latents]
        self.steps = 0
        self._codes: list[Tensor] | None = None
        self._past: list[_Past] | None = None

    @property
    def read(self) -> bool:
        """Whether codes to compare with are known."""
        return self._codes is not None

    def begin(self) -> None:
        """Read the codes to compare with."""
        self._codes = [each.levels() for each in self.latents]
        if self.window and self._past is None:
            self._past = [_Past(codes) for codes in self._codes]

    def count(self) -> list[int]:
        """How many weights of each changed their codes since they were last read.

        `Σ_i 1[w_t(i) ≠ w_{t−1}(i)]`, the sum of eq. 5 by layer.
        """
        if self._codes is None:
            self.begin()
            return [0] * len(self.latents)
        before, self._codes = self._codes, [each.levels() for each in self.latents]
        self.steps += 1
        changed = [new != old for new, old in zip(self._codes, before, strict=True)]
        for index, past in enumerate(self._past or ()):
            past.update(before[index], self._codes[index], changed[index], self)
        # Once for all layers, for a GPU is waited for here.
        counts: list[int] = torch.stack([e.count_nonzero() for e in changed]).tolist()
        return counts

    def oscillating(self) -> list[int]:
        """How many weights of each have gone back within the last `window` steps."""
        if not self._past:
            return [0] * len(self.latents)
        since = self.steps - self.window
        found = [(past.returned > since).count_nonzero() for past in self._past]
        counts: list[int] = torch.stack(found).tolist()
        return counts

    @torch.no_grad()
    def near(self) -> list[int] | None:
        """How many weights of each are near a transition point; None if not known."""
        found = []
        for each in self.latents:
            if each.positions is None:
                return None
            positions = each.positions()
            # Halves are where codes change; what is clipped is a whole number.
            distance = (positions - positions.floor() - 0.5).abs_()
            found.append((distance < NEAR).count_nonzero())
        counts: list[int] = torch.stack(found).tolist()
        return counts

    def past(self) -> list[list[Tensor]]:
        """What is remembered of each weight for oscillation, to be stored."""
        return [[e.former, e.changed, e.returned] for e in self._past or ()]

    def resume(self, steps: int, past: list[list[Tensor]]) -> None:
        """Go on from what `past` gave; codes are read anew before the next step."""
        self.steps, self._codes = steps, None
        if past and self.window:
            self._past = [_Past.of(*tensors) for tensors in past]


class _Past:
    """When each code of a weight last changed, from what, and when it last returned."""

    def __init__(self, codes: Tensor) -> None:
        flat = codes.flatten()
        self.former = flat.clone()
        self.changed = torch.full_like(flat, NEVER, dtype=torch.int32)
        self.returned = self.changed.clone()

    @classmethod
    def of(cls, former: Tensor, changed: Tensor, returned: Tensor) -> "_Past":
        past = cls(former)
        past.changed, past.returned = changed.clone(), returned.clone()
        return past

    def update(
        self, old: Tensor, new: Tensor, changed: Tensor, all_: Transitions
    ) -> None:
        # No index of what changed is made: a GPU would be waited for, layer by layer.
        old, new, changed = old.flatten(), new.flatten(), changed.flatten()
        back = changed & (new == self.former)
        back &= self.changed >= all_.steps - all_.window
        self.returned.masked_fill_(back, all_.steps)
        self.changed.masked_fill_(changed, all_.steps)
        torch.where(changed, old, self.former, out=self.former)
