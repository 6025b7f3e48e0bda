"""Feeds images through a host and gathers every layer's statistics."""

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters.errors import ConfigError, DataError, ModelError
from cora_plugin.batches import pick, samples
from cora_plugin.calibration import ImageSplit
from cora_plugin.config import CoRaConfig
from cora_plugin.host import Host
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Objective
from cora_plugin.outputs import Batch, Outputs
from cora_plugin.statistics.metrics import MOMENT, LayerStatistics
from cora_plugin.statistics.moments import InputMean, InputMoments
from cora_plugin.statistics.reach import Reach
from cora_plugin.statistics.sensitivity import collect_sensitivities

log = logging.getLogger(__name__)

ALIKE = 1e-3
"""How far norms of outputs may be apart on unlike machines."""

FEW = 4
"""Images that show which layers gradients reach."""


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
            config.held_out,
            config.sampled_images,
            config.seed,
            config.reserve_images,
            config.held_out_images,
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
        self._rows = {layer.name: 0 for layer in layers}
        self._slides = dict(self._rows)
        self._resized: set[str] = set()
        self._targets = {layer.name: layer for layer in layers}
        self._images = 0
        self._first = True
        self._closed = False
        self._finished: dict[str, LayerStatistics] | None = None
        self.unused: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether everything was gathered, here or for a model quantized before."""
        return self._finished is not None

    def again(self, host: Host, layers: Sequence[QuantizedLayer]) -> "Collector":
        """What was gathered, for the same network quantized at other bit widths.

        Float weights and quantized activations make the statistics, and these are the
        same.

        Args:
            host: The other model's host.
            layers: Its layers, some or all of those that this is of.
        """
        other = copy.copy(self)
        other._host, other._layers = host, layers
        return other

    @torch.no_grad()
    def update(self, batch: Batch) -> None:
        """Add a batch of the model's arguments; one without rows is nothing."""
        if not samples(batch):
            return
        if self._first:
            self.split.learn(self._float, batch)
            self._first = False
        kept = self.split.keep(batch)
        if kept is None or not samples(kept):
            return
        host = self._host
        with host.acting(self._floats), host.observe(self._watch):
            host.run(kept)
        self._images += samples(kept)

    def _float(self, batch: Batch) -> Outputs:
        with self._host.acting(quantized=False):
            return self._host.run(batch)

    def _watch(self, name: str, x: Tensor, output: Tensor) -> None:
        self._last = self._channels[name]
        if name not in self._running:
            return
        operation, kernel = self._targets[name].operation, self._targets[name].kernel
        sizes = tuple(output.shape[2:])
        slides = output.numel() // self._channels[name]
        self._rows[name] += slides
        if operation.transposed:
            if operation.output_size(x, kernel) != sizes:
                self._resized.add(name)
                return
            slides = x[:, 0].numel()
        self._slides[name] += slides
        for each in self._running[name].values():
            each.update(x, output)
        self._means[name].update(x)

    @torch.no_grad()
    def close(self) -> None:
        """End the pass over the data; what other processes have seen is added.

        Raises:
            DataError: There were too few images.
            ModelError: The processes have other models.
        """
        if self._closed:
            return
        self.split.close()
        if processes.count() > 1:
            self._check_alike()
            self._pool()
        self._closed = True

    def _check_alike(self) -> None:
        """Refuse other models and settings in other processes.

        Raises:
            ModelError: Quantized models give other outputs for the same images.
            ConfigError: Settings are others.
        """
        outputs = self._host.run(self.split.held_out()[0])
        norms = [float(value.double().norm()) for value in outputs.values()]
        settings = self._config.to_dict()
        for others, theirs in processes.gathered("settings", (norms, settings)):
            for key, value in settings.items():
                if theirs[key] != value:
                    raise ConfigError(
                        (key,),
                        f"{value}, and {theirs[key]} in another process; pass the same "
                        "in each",
                    )
            if len(others) != len(norms) or any(
                abs(mine - other) > ALIKE * max(mine, other)
                for mine, other in zip(norms, others, strict=True)
            ):
                raise ModelError(
                    "processes: their quantized models give other outputs for the same "
                    f"images (of norms {norms} and {others}); quantize with the same "
                    "data in each, or load the state_dict of one"
                )

    def _pool(self) -> None:
        """Add what other processes have seen."""
        for name in self._running:
            for each in self._running[name].values():
                each.pool()
            self._means[name].pool()
        seen = [*self._rows.values(), *self._slides.values(), self._images]
        seen = [int(each) for each in processes.add_up("positions", (), seen)]
        self._images = seen.pop()
        self._rows = dict(zip(self._rows, seen, strict=False))
        self._slides = dict(zip(self._slides, seen[len(self._rows) :], strict=True))
        self._resized.update(*processes.gathered("sizes", self._resized))

    @property
    def last_channels(self) -> int | None:
        """Output channels of the layer that ran last; None: none has run."""
        return self._last

    def finish(self, objective: Objective) -> dict[str, LayerStatistics]:
        """The statistics by layer; includes a backward pass, of few images if it may.

        Gathered once: later calls return what there is for the layers that are left.

        `unused` then tells which layers have none, and why; `notes` what was made up.

        Args:
            objective: What "near to the float model" means.

        Raises:
            DataError: The data cannot be used.
        """
        if self._finished is not None:
            names = {layer.name for layer in self._layers}
            return {n: each for n, each in self._finished.items() if n in names}
        self.close()
        self.unused = {
            name: "calibration never reached it"
            for name, rows in self._rows.items()
            if not rows
        }
        self.unused |= dict.fromkeys(
            sorted(self._resized),
            "it runs with an output_size that its output_padding does not give; set "
            "output_padding in place of output_size",
        )
        layers = [e for e in self._layers if e.name not in self.unused]
        sensitivities: dict[str, Tensor] = {}
        if layers:
            sensitivities = self._sensitivities(layers, objective)
        self._finished = {
            layer.name: LayerStatistics(
                {n: each.mean() for n, each in self._running[layer.name].items()},
                sensitivities.get(layer.name),
                max(round(self._rows[layer.name] / self._images), 1),
                max(round(self._slides[layer.name] / self._images), 1),
            )
            for layer in layers
            if layer.name not in self.unused
        }
        return self._finished

    def _sensitivities(
        self, layers: Sequence[QuantizedLayer], objective: Objective
    ) -> dict[str, Tensor]:
        """Curvatures by layer, where the search goes by them.

        Layers that do not matter go to `unused` whatever the search.
        """
        config, host, split = self._config, self._host, self.split
        wanted = config.search == "spectral"
        batches = split.sample(config.sensitivity_images) if wanted else self._few()
        try:
            found = collect_sensitivities(
                host, layers, batches, objective, config, split.whole
            )
        except (RuntimeError, DataError) as error:
            if wanted:
                raise
            log.debug("not looked for layers that do not matter: %s", error)
            return {}
        reach = Reach.of(host, layers, batches[0], found, objective)
        idle = (*reach.idle, *(reach.absent if wanted else ()))
        self.unused |= dict.fromkeys(
            idle, "the outputs that are measured do not depend on it"
        )
        if wanted:
            self.notes = reach.notes
            return {**found, **reach.made_up}
        if config.search == "butterworth":
            self.notes = reach.unlearned
        return {}

    def _few(self) -> tuple[Batch, ...]:
        """Some held-out images: other searches need not have a sample of the others."""
        batch = self.split.held_out()[0]
        rows = range(min(samples(batch), FEW))
        return (batch if self.split.whole else pick(batch, rows),)

    def means(self) -> dict[str, Tensor]:
        """Mean inputs `E[u]` [g, k] by layer."""
        return {name: each.mean() for name, each in self._means.items()}
