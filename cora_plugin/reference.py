"""The outputs to be reached for data that is run more than once."""

from collections.abc import Sequence

import torch

from cora_plugin.batches import Units
from cora_plugin.host import Host
from cora_plugin.outputs import Outputs, joined, rows
from cora_plugin.teacher import Teacher

KEPT = 2**28
"""Bytes of outputs that are kept; beyond it they are computed anew."""


class References:
    """Outputs to be reached, computed once where there is room to keep them.

    They are those of the float model, unless a teacher gives them.

    Memory does not grow with the number of pieces: of dense outputs few are kept, and
    the rest costs a float pass each time.

    Args:
        host: The prepared host.
        units: The pieces.
        teacher: What gives the outputs in place of the float model; None: nothing.
        room: Bytes of outputs that are kept.
    """

    def __init__(
        self,
        host: Host,
        units: Units,
        teacher: Teacher | None = None,
        room: int = KEPT,
    ) -> None:
        self._host = host
        self._teacher = teacher
        self._units = units
        self._room = room
        self._kept: dict[int, Outputs] = {}
        self._homes = {n: group for group in units.groups() for n in group}

    def ready(self, group: Sequence[int]) -> bool:
        """Whether nothing of a group has to be computed."""
        return all(number in self._kept for number in group)

    @torch.no_grad()
    def __call__(self, group: Sequence[int]) -> Outputs:
        """The outputs for some pieces, in their order, not within `Host.acting`.

        Args:
            group: Pieces that run together, by index.
        """
        # By the groups of the loader's order, so that what is kept does not depend on
        # who asked first: how many rows run together decides about the last bits.
        for number in group:
            if number not in self._kept and self._room > 0:
                home = self._homes[number]
                for other, part in self._computed(home).items():
                    self._keep(other, part)
        found = {n: self._kept[n] for n in group if n in self._kept}
        new = [number for number in group if number not in found]
        if new:
            found |= self._computed(new)
        return joined([found[number] for number in group])

    def _computed(self, group: Sequence[int]) -> dict[int, Outputs]:
        batch = self._units.batch(group)
        if self._teacher is not None:
            outputs = self._teacher(batch)
        else:
            with self._host.acting(quantized=False):
                outputs = self._host.run(batch)
        if len(group) == 1:
            return {group[0]: outputs}
        return {number: rows(outputs, [row]) for row, number in enumerate(group)}

    def _keep(self, number: int, part: Outputs) -> None:
        size = sum(value.numel() * value.element_size() for value in part.values())
        if number not in self._kept:
            if size <= self._room:
                self._kept[number] = part
            self._room -= size  # Below 0 once it is full.
