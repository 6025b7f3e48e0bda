"""Streamed statistics: what the inputs of a layer look like, and what its outputs cost.

Memory beyond the model is O(Σ k²): activations are reduced where they appear.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.factor import Weighting, metric_root
from cora_plugin.adapters.operation import patches, positions
from cora_plugin.calibration import ImageSplit
from cora_plugin.config import CoRaConfig
from cora_plugin.layer import Host, QuantizedLayer

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
            with the batches.
    """

    def __init__(
        self, layer: QuantizedLayer, kind: str, max_size: int, positions: int
    ) -> None:
        self._layer = layer
        self._kind = kind
        self._positions = positions
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
                self._add(patches(part, operation, kernel, step, start))
        self._turn += 1

    def _add(self, columns: Tensor) -> None:
        columns = columns.double()  # [g, p, k]
        self.rows += columns.shape[1]
        if self._kind == "absolute":
            self._sum += columns.abs().sum(1)
        elif self._kind == "square":
            self._sum += columns.square().sum(1)
        else:
            groups, rows, _ = columns.shape
            split = columns.reshape(groups, rows, self._blocks, -1).transpose(1, 2)
            self._sum += split.mT @ split

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


class OutputSensitivity:
    """Running curvature of the loss at a layer's output, `G = E[Σ_p g gᵀ]`, float64.

    g [m/g] is the gradient of the log-likelihood at one output position, with a label
    drawn from the model itself: the Fisher, hence the Gauss–Newton matrix of the KL
    divergence. A depthwise layer keeps the diagonal, [1, m]; others [g, m/g, m/g].
    With `positions` > 0 at most that many a sample are summed, and scaled up.
    """

    def __init__(self, layer: QuantizedLayer, positions: int) -> None:
        self._layer = layer
        self._positions = positions
        self._turn = 0
        outputs, groups = layer.weight.shape[0], layer.operation.groups
        shape = [1, outputs] if layer.depthwise else [groups, *[outputs // groups] * 2]
        self._sum = torch.zeros(shape, dtype=torch.float64, device=layer.weight.device)

    @torch.no_grad()
    def update(self, gradient: Tensor) -> None:
        """Add the gradient at one run's output, [N, m, *size] or [N, …, m]."""
        split = positions(gradient, self._layer.operation)  # [N, g, p, m/g]
        total = split.shape[2]
        step = math.ceil(total / self._positions) if self._positions else 1
        split = split[:, :, self._turn % step :: step]
        self._turn += 1
        scale = total / split.shape[2]
        if self._layer.depthwise:
            power = split.double().square().sum((0, 2))
            self._sum += scale * power.reshape(1, -1)
            return
        rows = split.transpose(0, 1).flatten(1, 2).double()  # [g, N·p, m/g]
        self._sum += scale * (rows.mT @ rows)

    def mean(self, images: int) -> Tensor:
        """The curvature an image."""
        return self._sum / images


def _block_count(layer: QuantizedLayer, max_size: int) -> int:
    """Fewest equal blocks of whole channels whose size is at most `max_size`."""
    channels = layer.weight.shape[1]
    for blocks in range(1, channels + 1):
        if channels % blocks == 0 and layer.columns // blocks <= max_size:
            return blocks
    return channels


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration told of one layer.

    `moments` by kind as `InputMoments` gives them, `sensitivity` as `OutputSensitivity`
    does or None, `outputs` the number of output positions an image.
    """

    moments: Mapping[str, Tensor]
    sensitivity: Tensor | None
    outputs: int

    def metric(self, layer: QuantizedLayer, config: CoRaConfig) -> Weighting:
        """The metric that the factors are optimal in."""
        moment = self.moments.get(_MOMENT.get(config.metric, ""))
        if config.metric == "lqer" and moment is not None:
            moment = moment.square()  # E|u| is the root of its metric
        return weighting(layer, moment, None, config.damping)

    def observed(self, layer: QuantizedLayer, config: CoRaConfig) -> Weighting:
        """The metric that errors are measured in: the best that was collected."""
        if "second" not in self.moments:
            return self.metric(layer, config)
        second = self.moments["second"]
        return weighting(layer, second, self.sensitivity, config.damping)


_MOMENT = {
    "lqer": "absolute",
    "qera-approx": "square",
    "qera-exact": "second",
}


class Collector:
    """Streams images through a host and gathers the statistics of its layers.

    Inputs are those of a model whose weights are float and whose activations are
    quantized, which is what the layers see once adapters have restored the weights; the
    inputs inside a collapsed model are not.
    """

    def __init__(
        self, host: Host, layers: Sequence[QuantizedLayer], config: CoRaConfig
    ) -> None:
        self._host = host
        self._layers = layers
        self._config = config
        self.split = ImageSplit(config.held_out, config.sensitivity_images, config.seed)
        kinds = {_MOMENT.get(config.metric, "square")}
        if config.search == "spectral":
            kinds.add("second")
        self._running = {
            layer.name: {
                kind: InputMoments(layer, kind, config.max_metric, config.positions)
                for kind in sorted(kinds)
            }
            for layer in layers
        }

    def update(self, item: Any) -> None:
        """Add what a calibration loader yielded: images, or a tuple that begins so."""
        images = self.split.keep(item)
        if not len(images):
            return
        host = self._host
        with torch.no_grad(), host.float_weights(), host.observe(self._watch):
            host.run(images)

    def _watch(self, name: str, x: Tensor, output: Tensor) -> None:
        for each in self._running.get(name, {}).values():
            each.update(x, output)

    def finish(self) -> dict[str, LayerStatistics]:
        """The statistics by layer; runs the sample backward if they ask for it.

        Raises:
            CoRaError: The data cannot be used, or a layer was never reached.
        """
        config = self._config
        self.split.close()
        moments = {
            name: {kind: each.mean() for kind, each in by_kind.items()}
            for name, by_kind in self._running.items()
        }
        sensitivities: Mapping[str, Tensor] = {}
        if config.search == "spectral":
            sensitivities = collect_sensitivities(
                self._host, self._layers, self.split.sample(), config
            )
        return {
            name: LayerStatistics(
                moments[name],
                sensitivities.get(name),
                next(iter(by_kind.values())).outputs,
            )
            for name, by_kind in self._running.items()
        }


def collect_sensitivities(
    host: Host,
    layers: Sequence[QuantizedLayer],
    batches: Sequence[Tensor],
    config: CoRaConfig,
) -> dict[str, Tensor]:
    """One backward pass of the float model over `batches`, labels sampled from it.

    The float model is where the KL divergence has its minimum, so its Fisher is the
    exact second derivative there; a collapsed quantized model's is not.

    Raises:
        CoRaError: The gradients are not finite, or none reaches a layer.
    """
    random = torch.Generator().manual_seed(config.seed)
    running = {
        layer.name: OutputSensitivity(layer, config.positions) for layer in layers
    }
    images = 0

    def watch(name: str, _: Tensor, output: Tensor) -> None:
        if name in running and output.requires_grad:
            output.register_hook(running[name].update)

    with torch.enable_grad(), host.float_model(), host.observe(watch):
        for batch in tqdm(batches, desc="gradients", unit="batch", disable=None):
            images += len(batch)
            output = host.run(batch.clone().requires_grad_())
            log_likelihood = output.log_softmax(1)
            labels = _sample_labels(log_likelihood.detach(), random)
            chosen = log_likelihood.gather(1, labels)
            torch.autograd.backward(chosen.sum())
    means = {name: each.mean(images) for name, each in running.items()}
    for name, mean in means.items():
        if not torch.isfinite(mean).all():
            raise CoRaError(f"{name}: the gradient at its output is not finite")
    return means


def _sample_labels(log_probabilities: Tensor, random: torch.Generator) -> Tensor:
    """Draw a class for each sample and position of [N, classes, …]; [N, 1, …]."""
    last = log_probabilities.movedim(1, -1)  # [N, …, classes]
    drawn = torch.multinomial(last.exp().cpu().flatten(0, -2), 1, generator=random)
    return drawn.view(*last.shape[:-1], 1).movedim(-1, 1).to(log_probabilities.device)


def weighting(
    layer: QuantizedLayer,
    moment: Tensor | None,
    sensitivity: Tensor | None,
    damping: float,
) -> Weighting:
    """The metrics of a layer's residual, from its statistics.

    A depthwise layer has a metric a channel, `R_c`, but one basis. It is taken as
    `R_c ≈ w_c² R̄` with `w_c² = tr R_c / k` and `R̄ = Σ R_c / Σ w_c²`: its channels are
    weighted by `w_c` and share `R̄`, which keeps the closed form.

    Args:
        layer: The layer.
        moment: `E[u uᵀ]` [g, b, k/b, k/b], a diagonal [g, k], or None for the identity.
        sensitivity: `G` [g, m/g, m/g], [1, m] when depthwise, or None.
        damping: Relative to each metric's mean diagonal.
    """
    if not layer.depthwise:
        inputs = None if moment is None else metric_root(moment, damping, layer.name)
        outputs = None
        if sensitivity is not None:
            outputs = metric_root(sensitivity[:, None], damping, layer.name)
        return Weighting(inputs, outputs)
    rows = torch.ones(1, layer.weight.shape[0], dtype=torch.float64)
    rows = rows.to(layer.weight.device)
    inputs = None
    if moment is not None:
        diagonal = moment if moment.ndim == 2 else moment.diagonal(dim1=-2, dim2=-1)
        power = diagonal.flatten(1).mean(1)  # [m]: w_c²
        if moment.ndim == 4:
            moment = moment[:, 0]
        shared = moment.sum(0) / power.sum().clamp_min(torch.finfo(power.dtype).tiny)
        shared = shared[None] if shared.ndim == 1 else shared[None, None]
        inputs = metric_root(shared, damping, layer.name)
        rows = rows * power
    if sensitivity is not None:
        rows = rows * sensitivity
    if moment is None and sensitivity is None:
        return Weighting()
    return Weighting(inputs, metric_root(rows, damping, layer.name))
