"""Curvature of the loss at the outputs of layers, by one backward pass."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cora_plugin.adapters.errors import DataError
from cora_plugin.adapters.exact import exact, exact_device
from cora_plugin.adapters.operation import output_rows
from cora_plugin.batches import samples
from cora_plugin.config import CoRaConfig
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.outputs import Batch, rebuilt
from cora_plugin.progress import bar


class OutputSensitivity:
    """Running curvature of the loss at a layer's output, `G = E[Σ_p g gᵀ]`, float64.

    g [m/g] is the gradient of the objective's probe at one output position: for the KL
    divergence that of the log-likelihood of a label drawn from the model itself, so
    that G is the Fisher, hence the Gauss–Newton matrix. A depthwise layer keeps the
    diagonal, [1, m]; others [g, m/g, m/g]. With `positions` > 0 at most that many a
    sample are summed, and scaled up.
    """

    def __init__(self, layer: QuantizedLayer, positions: int) -> None:
        self._layer = layer
        self._positions = positions
        self._turn = 0
        self.reached = False
        outputs, groups = layer.weight.shape[0], layer.operation.groups
        shape = [1, outputs] if layer.depthwise else [groups, *[outputs // groups] * 2]
        device = exact_device(layer.weight.device)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, gradient: Tensor) -> None:
        """Add the gradient at one run's output, [N, m, *size] or [N, …, m]."""
        self.reached = True
        split = output_rows(gradient, self._layer.operation)  # [N, g, p, m/g]
        total = split.shape[2]
        step = math.ceil(total / self._positions) if self._positions else 1
        split = split[:, :, self._turn % step :: step]
        self._turn += 1
        scale = total / split.shape[2]
        if self._layer.depthwise:
            power = exact(split).square().sum((0, 2))
            self._sum += scale * power.reshape(1, -1)
            return
        rows = exact(split.transpose(0, 1).flatten(1, 2))  # [g, N·p, m/g]
        self._sum += scale * (rows.mT @ rows)

    def mean(self, images: int) -> Tensor:
        """The curvature an image."""
        return self._sum / images


def collect_sensitivities(
    host: Host,
    layers: Sequence[QuantizedLayer],
    batches: Sequence[Batch],
    objective: Objective,
    config: CoRaConfig,
) -> dict[str, Tensor]:
    """One backward pass of the float model over `batches`, from the objective's probe.

    The float model is where the distance has its minimum, so its Gauss–Newton matrix is
    the exact second derivative there; a collapsed quantized model's is not.

    Gradients come from the input; where some layers get none so, for it is integers or
    the forward cuts it off, once more from zeros that are added to every layer's
    output. What no gradient reaches then is left out.

    Raises:
        DataError: The gradients are not finite.
    """
    found = _gradients(host, layers, batches, objective, config, shifted=False)
    if len(found) < len(layers):
        found = _gradients(host, layers, batches, objective, config, shifted=True)
    for name, mean in found.items():
        if not torch.isfinite(mean).all():
            raise DataError(
                f"{name}: the gradient at its output is not finite; look for NaN, inf "
                "or very large activations in the calibration data"
            )
    return found


def _gradients(
    host: Host,
    layers: Sequence[QuantizedLayer],
    batches: Sequence[Batch],
    objective: Objective,
    config: CoRaConfig,
    shifted: bool,
) -> dict[str, Tensor]:
    """The curvatures at the layers that gradients reach, by layer."""
    random = torch.Generator().manual_seed(config.seed)
    running = {
        layer.name: OutputSensitivity(layer, config.positions) for layer in layers
    }
    shifts = {
        layer.name: layer.weight.new_zeros(len(layer.weight)).requires_grad_()
        for layer in layers
        if shifted
    }
    images = 0

    def watch(name: str, _: Tensor, output: Tensor) -> None:
        if name in running and output.requires_grad:
            output.register_hook(running[name].update)

    with (
        torch.enable_grad(),
        host.acting(shifts=shifts, quantized=False),
        host.observe(watch),
    ):
        for batch in bar(batches, "gradients", "batch"):
            images += samples(batch)
            probe = objective.probe(host.run(_wanting(batch)), random)
            if probe.requires_grad:
                torch.autograd.backward(probe)
    return {n: each.mean(images) for n, each in running.items() if each.reached}


def _wanting(batch: Batch) -> Batch:
    """A batch whose tensors of floats want gradients."""
    if isinstance(batch, Tensor):
        copy = batch.clone()
        return copy.requires_grad_() if copy.is_floating_point() else copy
    if isinstance(batch, Mapping):
        return {name: _wanting(item) for name, item in batch.items()}
    if isinstance(batch, tuple | list):
        wanting: Batch = rebuilt(batch, map(_wanting, batch))
        return wanting
    return batch
