"""One pass through the quantized network that corrects each layer as it runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters import Adapter, Branch
from cora_plugin.adapters.exact import exact
from cora_plugin.batches import pick, samples
from cora_plugin.calibration import ImageSplit
from cora_plugin.config import CoRaConfig
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.outputs import Batch
from cora_plugin.progress import counter
from cora_plugin.statistics.moments import sampled_columns

PARTS = 8
"""Parts of the images that keep different output positions."""


@dataclass(frozen=True)
class Change:
    """A change to a layer's output: a shift [m] and perhaps an adapter.

    `whole_shift` is what the shift would be if it restored the mean to full size.
    """

    shift: Tensor
    adapter: Adapter | None = None
    whole_shift: Tensor | None = None

    def apply(self, layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        """Change the layer's output for its input `x`, in place and part by part."""
        ones = [1] * layer.operation.dimensions
        output += self.shift.to(output).view(-1, *ones)
        if self.adapter is not None:
            branch = Branch(self.adapter, layer.operation).to(x)
            for some, answer in zip(_parts(x), _parts(output), strict=True):
                answer += branch(some)

    def merged(self, weight: Tensor) -> Tensor:
        """A main weight with the adapter added."""
        if self.adapter is None:
            return weight
        return weight + self.adapter.merged().to(weight)


class Visitor(Protocol):
    """Looks at one layer in both networks and says how to change it."""

    def update(self, part: int, u: Tensor, v: Tensor) -> None:
        """Take unfolded inputs of one part of the images, below `PARTS`.

        Columns [g, p, k] in float64 at the same positions, float and quantized.
        """

    def pool(self) -> None:
        """Add what other processes were shown, where each has some of the parts."""

    def change(self, mean: Tensor, other: Tensor) -> Change:
        """The change, by the mean outputs [m] of the float and the quantized layer."""


@dataclass(frozen=True)
class _Run:
    """A run of a layer: sampled columns [g, p, k] by part, and its output's sum."""

    columns: Sequence[tuple[int, Tensor]]
    sum: Tensor
    rows: int


class _Cut:
    """How images are cut into parts, and which parts this process has.

    All of them, unless there are parts for every process. `shared` tells.

    Args:
        images: The images, the same in all processes.
        whole: Whether they cannot be taken apart.
    """

    def __init__(self, images: Batch, whole: bool) -> None:
        parts = torch.arange(samples(images)).tensor_split(min(PARTS, samples(images)))
        self.shared = not whole and 1 < processes.count() <= len(parts)
        self._numbers = processes.mine(range(len(parts)))
        own = [parts[number] for number in self._numbers]
        self._ends = torch.tensor([len(part) for part in own]).cumsum(0)
        self.images = images
        if self.shared:
            self.images = pick(images, torch.cat(own).tolist())

    def __call__(self, x: Tensor) -> Sequence[tuple[int, Tensor]]:
        """The parts of a layer's input, with their numbers."""
        if not self.shared:
            return list(enumerate(_parts(x)))
        # Rows may be folded into the batch: so many of them are one image's.
        ends = (self._ends[:-1] * len(x) // int(self._ends[-1])).tolist()
        return list(zip(self._numbers, x.tensor_split(ends), strict=True))


class _AgainError(Exception):
    """Restarts a pass: a layer that runs more than once has its change now."""


class Walk:
    """Goes through the quantized network beside the float one.

    The float network runs once, and the columns of every layer's input that statistics
    need are kept. Then the quantized network runs once: each layer is changed while it
    runs, on the inputs that the changed layers before it give. The change of a layer
    that runs more than once is found at its last run; then the network starts again.

    Args:
        host: The prepared host.
        layers: The layers to visit.
        images: Images that both networks run at once.
        positions: Output positions an image kept at most, 0 for all.
        whole: Whether the images cannot be taken apart; else several processes share
            them.
    """

    def __init__(
        self,
        host: Host,
        layers: Sequence[QuantizedLayer],
        images: Batch,
        positions: int,
        whole: bool = False,
    ) -> None:
        self._host = host
        self._cut = _Cut(images, whole)
        self._positions = positions
        self._layers = {layer.name: layer for layer in layers}
        self._originals: dict[str, list[_Run]] = {}
        with torch.no_grad(), host.acting(quantized=False), host.observe(self._keep):
            host.run(self._cut.images)

    @classmethod
    def sampled(
        cls,
        host: Host,
        layers: Sequence[QuantizedLayer],
        split: ImageSplit,
        config: CoRaConfig,
    ) -> "Walk":
        """Over a few of the calibration images, as many as the settings say."""
        images = split.together(config.sequential_images)
        return cls(host, layers, images, config.positions, split.whole)

    def _keep(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self._layers:
            layer = self._layers[name]
            columns = _columns(layer, self._cut(x), output, self._positions)
            kept = [(part, u.to(x.dtype)) for part, u in columns]
            run = _Run(kept, *_summed(layer, output))
            self._originals.setdefault(name, []).append(run)

    def forget(self, names: Iterable[str]) -> None:
        """Drop the columns of layers that no later call is to visit."""
        for name in names:
            self._originals.pop(name, None)

    @torch.no_grad()
    def __call__(
        self,
        visitor: Callable[[QuantizedLayer], Visitor],
        weights: Mapping[str, Tensor] | None = None,
        known: Mapping[str, Change] | None = None,
    ) -> dict[str, Change]:
        """Visit every layer that runs.

        Args:
            visitor: Makes the visitor of a layer.
            weights: Weights in the place of `QuantizedLayer.dequantized`, by name.
            known: Changes of layers that are not to be visited again, by name.

        Returns:
            The changes by layer name, in the order in which they were found.
        """
        host, originals, changes = self._host, self._originals, dict(known or {})
        layers = {name: self._layers[name] for name in [*changes, *originals]}
        goal = len(layers)
        main = {name: each.dequantized for name, each in self._layers.items()}
        progress = counter("layer by layer", "layer", goal)
        with progress:

            def begun(layer: QuantizedLayer) -> Visitor:
                progress.update(len(changes) + 1 - progress.n)
                return visitor(layer)

            found = -1
            while found < len(changes) < goal:
                found = len(changes)
                given = originals, self._positions, self._cut
                once = _Pass(layers, *given, begun, changes)
                # What is known when a pass begins is merged into the weights: one
                # convolution then runs where a branch would be a second.
                acting = main | dict(weights or {})
                for name, change in changes.items():
                    acting[name] = change.merged(acting[name])
                shifts = {name: change.shift for name, change in changes.items()}
                with (
                    suppress(_AgainError),
                    host.acting(acting, shifts),
                    host.observe(once),
                ):
                    host.run(self._cut.images)
        return changes


class _Pass:
    """Observes one run of the quantized network, changes it, and adds to `changes`."""

    def __init__(
        self,
        layers: Mapping[str, QuantizedLayer],
        originals: Mapping[str, Sequence[_Run]],
        positions: int,
        cut: _Cut,
        visitor: Callable[[QuantizedLayer], Visitor],
        changes: dict[str, Change],
    ) -> None:
        self._layers = layers
        self._originals = originals
        self._positions = positions
        self._cut = cut
        self._visitor = visitor
        self._changes = changes
        self._known = set(changes)
        self._open: dict[str, tuple[Visitor, list[_Run]]] = {}

    def __call__(self, name: str, x: Tensor, output: Tensor) -> None:
        """Change a layer's output, once its change has been found in this pass."""
        layer = self._layers.get(name)
        if layer is None or name in self._known:
            return
        # While a layer waits for its last run, those behind it are not looked at.
        if name not in self._changes and not set(self._open) - {name}:
            self._look(layer, x, output)
        if name in self._changes:
            self._changes[name].apply(layer, x, output)

    def _look(self, layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        name, originals = layer.name, self._originals[layer.name]
        if name not in self._open:
            self._open[name] = self._visitor(layer), []
        visitor, runs = self._open[name]
        columns = _columns(layer, self._cut(x), output, self._positions)
        same = originals[len(runs)].columns
        for (_, u), (part, v) in zip(same, columns, strict=True):
            visitor.update(part, u.to(v), v)
        runs.append(_Run((), *_summed(layer, output)))
        if len(runs) < len(originals):
            return
        del self._open[name]
        if self._cut.shared:
            visitor.pool()
        means = (_mean(name, each, self._cut.shared) for each in (originals, runs))
        self._changes[name] = visitor.change(*means)
        if len(runs) > 1:
            raise _AgainError


def _columns(
    layer: QuantizedLayer,
    parts: Sequence[tuple[int, Tensor]],
    output: Tensor,
    positions: int,
) -> Iterator[tuple[int, Tensor]]:
    """Columns [g, p, k] of a layer's input by part, at the same positions each time."""
    kept = min(positions, layer.columns)
    for index, part in parts:
        for columns in sampled_columns(layer, part, output, kept, index):
            yield index, columns


def _parts(x: Tensor) -> Sequence[Tensor]:
    return x.tensor_split(min(PARTS, len(x)))


def _summed(layer: QuantizedLayer, output: Tensor) -> tuple[Tensor, int]:
    """An output's sum [m] over images and positions, in float64, and their number."""
    count = output.numel() // len(layer.weight)
    if layer.operation.dimensions:
        # Summed in float32 over the positions of an image: a copy in float64 is slow.
        over = tuple(range(2, output.ndim))
        return exact(output.sum(over, dtype=torch.float32)).sum(0), count
    return exact(output).flatten(0, -2).sum(0), count


def _mean(name: str, runs: Sequence[_Run], shared: bool) -> Tensor:
    total = torch.stack([run.sum for run in runs]).sum(0)
    rows: float = sum(run.rows for run in runs)
    if shared:
        (rows,) = processes.add_up(f"mean outputs of {name}", [total], [rows])
    return total / rows
