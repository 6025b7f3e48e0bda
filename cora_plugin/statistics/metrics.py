"""Turns the statistics of a layer into the metrics of its residual."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cora_plugin.adapters.exact import exact_device
from cora_plugin.adapters.factor import Weighting, metric_root
from cora_plugin.config import CoRaConfig
from cora_plugin.layer import QuantizedLayer

MOMENT = {
    "lqer": "absolute",
    "qera-approx": "square",
    "qera-exact": "second",
}
"""The moment that each metric needs of the inputs; "svd" needs none."""


@dataclass(frozen=True)
class LayerStatistics:
    """The statistics of one layer.

    `moments` by name as `InputMoments` gives them, `sensitivity` as `OutputSensitivity`
    does or None, `outputs` the number of output positions an image, over all runs, and
    `slides` that of positions at which the layer's filters are applied.
    """

    moments: Mapping[str, Tensor]
    sensitivity: Tensor | None
    outputs: int
    slides: int
    _roots: dict[tuple[str, float], Weighting] = field(
        default_factory=dict, repr=False, compare=False
    )

    def metric(self, layer: QuantizedLayer, config: CoRaConfig) -> Weighting:
        """The metric that the factors are optimal in, factored once."""
        key = config.metric, config.damping
        if key not in self._roots:
            moment = self.moments.get(MOMENT.get(config.metric, ""))
            if config.metric == "lqer" and moment is not None:
                moment = moment.square()  # E|u| is the root of its metric
            self._roots[key] = weighting(layer, moment, None, config.damping)
        return self._roots[key]

    def observed(self, layer: QuantizedLayer, config: CoRaConfig) -> Weighting:
        """The metric that errors are measured in: the best that was collected."""
        if "second" not in self.moments:
            return self.metric(layer, config)
        key = "observed", config.damping
        if key not in self._roots:
            second = self.moments["second"]
            whole = weighting(layer, second, self.sensitivity, config.damping)
            if config.metric == "qera-exact" and not layer.depthwise:
                # Of the same inputs: one root serves both.
                inputs = self.metric(layer, config).inputs
                whole = Weighting(inputs, whole.outputs)
            self._roots[key] = whole
        return self._roots[key]


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
    device = exact_device(layer.weight.device)
    rows = torch.ones(1, len(layer.weight), dtype=torch.float64, device=device)
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
