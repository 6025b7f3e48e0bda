"""Curvature of the loss at the outputs of layers, by one backward pass."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import DataError
from cora_plugin.adapters.exact import exact, exact_device
from cora_plugin.adapters.operation import output_rows
from cora_plugin.batches import pick, samples
from cora_plugin.config import CoRaConfig
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.outputs import Batch, Outputs, rebuilt
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

    def pool(self) -> None:
        """Add what other processes have seen."""
        what = f"sensitivity of {self._layer.name}"
        (reached,) = processes.add_up(what, [self._sum], [self.reached])
        self.reached = reached > 0

    def mean(self, images: int) -> Tensor:
        """The curvature an image."""
        return self._sum / images


def collect_sensitivities(
    host: Host,
    layers: Sequence[QuantizedLayer],
    batches: Sequence[Batch],
    objective: Objective,
    config: CoRaConfig,
    whole: bool = False,
) -> dict[str, Tensor]:
    """One backward pass of the float model over `batches`, from the objective's probe.

    The float model is where the distance has its minimum, so its Gauss–Newton matrix is
    the exact second derivative there; a collapsed quantized model's is not.

    Gradients come from the input; where some layers get none so, for it is integers or
    the forward cuts it off, once more from zeros that are added to every layer's
    output. What no gradient reaches then is left out.

    Args:
        host: The prepared host.
        layers: The layers.
        batches: The data, the same in all processes; each runs some rows of a batch.
        objective: What "near to the float model" means.
        config: The settings.
        whole: Whether batches cannot be taken apart: then each process runs them all.

    Raises:
        DataError: The gradients are not finite.
    """
    given = host, layers, batches, objective, config, whole
    found = _gradients(*given, shifted=False)
    if len(found) < len(layers):
        found = _gradients(*given, shifted=True)
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
    whole: bool,
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
            rows = range(samples(batch))
            share = rows if whole else processes.mine(rows)
            if len(share) < len(rows):
                outputs = _run_share(host, batch, share)
            else:
                outputs = host.run(_wanting(batch))
            if not outputs:
                continue
            probe = objective.probe(outputs, random)
            if probe.requires_grad:
                torch.autograd.backward(probe)
    if not whole:
        for each in running.values():
            each.pool()
    return {n: each.mean(images) for n, each in running.items() if each.reached}


def _run_share(host: Host, batch: Batch, rows: Sequence[int]) -> Outputs:
    """The outputs for some rows, among zeros for the others; empty without rows.

    A probe then draws for every row, so that each has the draw of one process alone.
    """
    if not rows:
        return {}
    found = {}
    for name, value in host.run(_wanting(pick(batch, rows))).items():
        among = value.new_zeros(samples(batch), *value.shape[1:])
        index = torch.tensor(rows, device=value.device)
        found[name] = among.index_copy(0, index, value)
    return found


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
