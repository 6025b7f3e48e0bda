"""Feeds images through a host and gathers every layer's statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cora_plugin.calibration import ImageSplit
from cora_plugin.config import CoRaConfig
from cora_plugin.layer import Host, QuantizedLayer
from cora_plugin.statistics.metrics import MOMENT, LayerStatistics
from cora_plugin.statistics.moments import InputMean, InputMoments
from cora_plugin.statistics.sensitivity import collect_sensitivities


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
        self._floats = {layer.name: layer.weight for layer in host.layers}
        self.split = ImageSplit(config.held_out, config.sampled_images, config.seed)
        kinds = {MOMENT.get(config.metric, "square")}
        if config.search == "spectral":
            kinds.add("second")
        self._running = {
            layer.name: {
                kind: InputMoments(layer, kind, config.max_metric, config.positions)
                for kind in sorted(kinds)
            }
            for layer in layers
        }
        own = config.bias_correction == "own"
        self._means = {layer.name: InputMean(layer) for layer in layers if own}

    def update(self, item: Any) -> None:
        """Add what a calibration loader yielded: images, or a tuple that begins so."""
        images = self.split.keep(item)
        if not len(images):
            return
        host = self._host
        with torch.no_grad(), host.weights(self._floats), host.observe(self._watch):
            host.run(images)

    def _watch(self, name: str, x: Tensor, output: Tensor) -> None:
        if name not in self._running:
            return
        for each in self._running[name].values():
            each.update(x, output)
        if name in self._means:
            self._means[name].update(x)

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
                self._host,
                self._layers,
                self.split.sample(config.sensitivity_images),
                config,
            )
        return {
            name: LayerStatistics(
                moments[name],
                sensitivities.get(name),
                next(iter(by_kind.values())).outputs,
            )
            for name, by_kind in self._running.items()
        }

    def means(self) -> dict[str, Tensor]:
        """Mean inputs by layer, where `bias_correction` is `own`, which needs them."""
        return {name: each.mean() for name, each in self._means.items()}
