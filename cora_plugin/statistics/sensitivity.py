"""Curvature of the loss at the outputs of layers, by one backward pass."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.operation import positions
from cora_plugin.config import CoRaConfig
from cora_plugin.layer import Host, QuantizedLayer


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
