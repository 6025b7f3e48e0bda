"""Visits layers in execution order, with what they see in both networks."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cora_plugin.layer import Host, QuantizedLayer


@dataclass(frozen=True)
class Pair:
    """One run of a layer on the same images: in the float and the quantized network.

    Inputs [N, n, *size] or [N, …, n], outputs [N, m, *size'] or [N, …, m].
    """

    float_input: Tensor
    float_output: Tensor
    input: Tensor
    output: Tensor


class _Reached(Exception):  # noqa: N818, it is no error
    """The layer has run: what follows it is not needed."""


class Walk:
    """Goes through the layers as the network does.

    Args:
        host: The prepared host.
        layers: The layers to visit.
        batches: Images [N, …] that are run for each of them.
    """

    def __init__(
        self, host: Host, layers: Sequence[QuantizedLayer], batches: Sequence[Tensor]
    ) -> None:
        self._host = host
        self._batches = batches
        self._calls: Counter[str] = Counter()
        wanted = {layer.name: layer for layer in layers}
        with torch.no_grad(), host.observe(lambda n, *_: self._calls.update([n])):
            host.run(batches[0][:1])
        self._layers = [wanted[name] for name in self._calls if name in wanted]

    def __iter__(self) -> Iterator[QuantizedLayer]:
        """The layers in execution order, with progress."""
        yield from tqdm(self._layers, desc="layer by layer", unit="layer", disable=None)

    @torch.no_grad()
    def pairs(
        self,
        layer: QuantizedLayer,
        weights: Mapping[str, Tensor],
        shifts: Mapping[str, Tensor],
    ) -> Iterator[Pair]:
        """What a layer sees and answers, with other weights and shifts before it."""
        host = self._host
        for batch in self._batches:
            with host.float_model():
                originals = self._run(layer.name, batch)
            with host.weights(weights, shifts):
                found = self._run(layer.name, batch)
            for original, other in zip(originals, found, strict=True):
                yield Pair(*original, *other)

    def _run(self, name: str, batch: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Run the network until a layer has run as often as it does."""
        seen: list[tuple[Tensor, Tensor]] = []

        def watch(reached: str, x: Tensor, output: Tensor) -> None:
            if reached == name:
                seen.append((x, output))
                if len(seen) == self._calls[name]:
                    raise _Reached

        with suppress(_Reached), self._host.observe(watch):
            self._host.run(batch)
        return seen
