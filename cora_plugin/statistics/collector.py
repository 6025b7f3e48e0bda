"""Feeds images through a host and gathers every layer's statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cora_plugin.calibration import ImageSplit
from cora_plugin.config import CoRaConfig
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.statistics.metrics import MOMENT, LayerStatistics
from cora_plugin.statistics.moments import InputMean, InputMoments
from cora_plugin.statistics.sensitivity import collect_sensitivities


class Collector:
    """Streams images through a host and gathers the statistics of its layers.

    The model runs with float weights and quantized activations: its layers then see
    what they will see once adapters have restored the weights. A collapsed model's
    layers see something else.
    """

    def __init__(
        self,
        host: Host,
        layers: Sequence[QuantizedLayer],
        config: CoRaConfig,
    ) -> None:
        self._host = host
        self._layers = layers
        self._channels = {e.name: len(e.weight) for e in host.layers}
        self._last: int | None = None
        self._config = config
        self._floats = {layer.name: layer.weight for layer in host.layers}
        self.split = ImageSplit(
            config.held_out, config.sampled_images, config.seed, config.reserve_images
        )
        moments = {MOMENT.get(config.metric, "square")}
        if config.search == "spectral":
            moments.add("second")
        self._running = {
            layer.name: {
                name: InputMoments(layer, name, config.max_metric, config.positions)
                for name in sorted(moments)
            }
            for layer in layers
        }
        self._means = {layer.name: InputMean(layer) for layer in layers}

    def update(self, item: Any) -> None:
        """Add what a calibration loader yielded: images, or a tuple that begins so."""
        images = self.split.keep(item)
        if not len(images):
            return
        host = self._host
        with torch.no_grad(), host.acting(self._floats), host.observe(self._watch):
            host.run(images)

    def _watch(self, name: str, x: Tensor, output: Tensor) -> None:
        self._last = self._channels[name]
        if name not in self._running:
            return
        for each in self._running[name].values():
            each.update(x, output)
        self._means[name].update(x)

    @property
    def last_channels(self) -> int | None:
        """Output channels of the layer that ran last; None: none has run."""
        return self._last

    def finish(self, objective: Objective) -> dict[str, LayerStatistics]:
        """The statistics by layer; includes a backward pass where the search needs it.

        Args:
            objective: What "near to the float model" means.

        Raises:
            DataError: The data cannot be used, or a layer was never reached.
        """
        config = self._config
        self.split.close()
        moments = {
            name: {moment: each.mean() for moment, each in by_moment.items()}
            for name, by_moment in self._running.items()
        }
        sensitivities: Mapping[str, Tensor] = {}
        if config.search == "spectral":
            sensitivities = collect_sensitivities(
                self._host,
                self._layers,
                self.split.sample(config.sensitivity_images),
                objective,
                config,
            )
        return {
            name: LayerStatistics(
                moments[name],
                sensitivities.get(name),
                next(iter(by_moment.values())).outputs,
            )
            for name, by_moment in self._running.items()
        }

    def means(self) -> dict[str, Tensor]:
        """Mean inputs `E[u]` [g, k] by layer."""
        return {name: each.mean() for name, each in self._means.items()}
