"""Layers that no gradient reaches: those that do not matter, and what stands in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cora_plugin.adapters.exact import exact_device
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.outputs import Batch, Outputs


@dataclass(frozen=True)
class Reach:
    """What is known of the layers that have no sensitivity.

    `made_up` stands in for the curvature of those that outputs depend on: the same for
    all channels, so large that an error of the layer's own size costs what it does at
    other layers. `idle` are those that no output depends on, `absent` those that the
    batch did not run.
    """

    made_up: Mapping[str, Tensor]
    idle: tuple[str, ...]
    absent: tuple[str, ...]
    known: int

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        host: Host,
        layers: Sequence[QuantizedLayer],
        batch: Batch,
        known: Mapping[str, Tensor],
        objective: Objective,
    ) -> "Reach":
        """Look at the layers that have no sensitivity.

        Args:
            host: The prepared host.
            layers: Layers that ran.
            batch: Some of the data.
            known: The sensitivities that there are, by layer.
            objective: What "near to the float model" means.
        """
        missing = [layer for layer in layers if layer.name not in known]
        if not missing:
            return cls({}, (), (), len(known))
        power, outputs = _powers(host, batch)
        costs = [
            float(_trace(known[e.name])) * power[e.name]
            for e in layers
            if e.name in known and power.get(e.name)
        ]
        costs = [cost for cost in costs if cost > 0]
        typical = 1.0
        if costs:
            logs = torch.tensor(costs, dtype=torch.float64).log()
            typical = float(logs.mean().exp())
        made_up, idle = {}, []
        absent = tuple(e.name for e in missing if e.name not in power)
        for layer in missing:
            if layer.name in absent:
                continue
            own = power[layer.name]
            if not own or not _matters(host, layer, own, batch, outputs, objective):
                idle.append(layer.name)
                continue
            made_up[layer.name] = typical / (own * len(layer.weight)) * _ones(layer)
        return cls(made_up, tuple(idle), absent, len(known))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report says."""
        costs = "elsewhere" if self.known else "anywhere"
        return self._cut_off(
            f"an error there is taken to cost what one of its size costs {costs}"
        )

    @property
    def unlearned(self) -> tuple[str, ...]:
        """What it says where ranks are learned by gradients."""
        return self._cut_off(
            "their ranks are not learned, but what butterworth.initial_cutoff begins "
            "with; search=spectral has ranks for them"
        )

    def _cut_off(self, then: str) -> tuple[str, ...]:
        if not self.made_up:
            return ()
        names = ", ".join(self.made_up)
        return (
            f"no gradient reaches {names}, for the forward cuts it off (no_grad, "
            f"detach): {then}",
        )


def _powers(host: Host, batch: Batch) -> tuple[dict[str, float], Outputs]:
    """The mean square of each layer's float output, and the model's outputs."""
    power: dict[str, float] = {}

    def watch(name: str, _: Tensor, output: Tensor) -> None:
        power[name] = float(output.float().square().mean())

    with host.acting(quantized=False), host.observe(watch):
        return power, host.run(batch)


def _matters(
    host: Host,
    layer: QuantizedLayer,
    power: float,
    batch: Batch,
    outputs: Outputs,
    objective: Objective,
) -> bool:
    """Whether what is measured changes when the layer's output does."""
    shift = torch.full_like(layer.weight.flatten(1)[:, 0], power**0.5)
    with host.acting(shifts={layer.name: shift}, quantized=False):
        moved = host.run(batch)
    return bool(objective.distance(outputs, moved).abs().max() > 0)


def _trace(curvature: Tensor) -> Tensor:
    """The trace of [g, m/g, m/g] or of a diagonal [1, m]."""
    if curvature.ndim == 2:
        return curvature.sum()
    return curvature.diagonal(dim1=-2, dim2=-1).sum()


def _ones(layer: QuantizedLayer) -> Tensor:
    """The identity in the shape of a layer's sensitivity."""
    outputs, groups = len(layer.weight), layer.operation.groups
    device = exact_device(layer.weight.device)
    if layer.depthwise:
        return torch.ones(1, outputs, dtype=torch.float64, device=device)
    one = torch.eye(outputs // groups, dtype=torch.float64, device=device)
    return one.repeat(groups, 1, 1)
