"""What brings a model nearer to its float original, step by guarded step."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from cora_plugin.config import CoRaConfig
from cora_plugin.fitting import (
    Distillation,
    Walk,
    alternate,
    cascaded_shifts,
    own_shifts,
    regress,
)
from cora_plugin.guard import Guard
from cora_plugin.layer import Correction, Host, QuantizedLayer
from cora_plugin.plan import Planner, merged_weights
from cora_plugin.report import Stopwatch
from cora_plugin.statistics import Collector

SHARES = (0.5, 0.25)
"""What is tried of adapters that do not help as a whole.

Weights that GPFQ or Qronos rounded make up for the error of the layers before; where
adapters take only a part of that error away, the rest no longer cancels.
"""


class Steps:
    """Corrects a model step by step; `guard.kept` is what stands.

    `fit_iterations` and `fit_images` tell the refinement's effort.

    Args:
        config: The settings.
        host: The prepared host.
        collector: Has the statistics and the sampled images.
        planner: Has the factors.
        guard: Judges each step.
        watch: Takes each step's time.
    """

    def __init__(
        self,
        config: CoRaConfig,
        host: Host,
        collector: Collector,
        planner: Planner,
        guard: Guard,
        watch: Stopwatch,
    ) -> None:
        self._config = config
        self._host = host
        self._collector = collector
        self._planner = planner
        self._guard = guard
        self._watch = watch
        self.fit_iterations = self.fit_images = 0

    def __call__(self, ranks: Mapping[str, int]) -> None:
        """Take every step that the settings ask for; ranks by layer name."""
        config, guard = self._config, self._guard
        correction = self._closed_form(ranks)
        with self._watch("insert"):
            stands = guard.step("adapters", correction, ties=True)
        if stands and config.alternations:
            self._alternation()
        if config.metric == "rrr" and any(ranks.values()):
            correction = self._regression(ranks)
            with self._watch("regression"):
                stands |= guard.step("regression", correction)
        if not stands:
            with self._watch("insert"):
                for share in SHARES:
                    guard.step(f"adapters × {share:g}", correction.scaled(share))
        if self._host.biases_changed and not guard.kept.float_biases:
            guard.step("float biases", replace(guard.kept, float_biases=True))
        # A regression that stands has an intercept of its own.
        if config.bias_correction != "off" and not guard.kept.shifts:
            self._bias_correction()
        if config.fit.iterations:
            self._refinement()

    @property
    def _layers(self) -> Sequence[QuantizedLayer]:
        """The layers, with the main weights that stand."""
        return list(self._planner.layers.values())

    def _closed_form(self, ranks: Mapping[str, int]) -> Correction:
        with self._watch("factors"):
            return Correction(self._planner.adapters(ranks))

    def _alternation(self) -> None:
        guard, planner = self._guard, self._planner
        with self._watch("alternation"), guard.aside():
            layers = planner.targets
            adapters, weights, changed = alternate(
                self._host,
                layers,
                guard.kept.adapters,
                {layer.name: planner.metric(layer) for layer in layers},
                self._config.alternations,
            )
        correction = replace(guard.kept, adapters=adapters, weights=weights)
        if guard.step("alternation", correction):
            planner.layers = {layer.name: layer for layer in changed}

    def _regression(self, ranks: Mapping[str, int]) -> Correction:
        guard = self._guard
        with self._watch("regression"), guard.aside():
            curvatures = self._planner.sensitivities
            adapters, shifts = regress(self._walk(), ranks, curvatures, self._config)
        return replace(
            guard.kept,
            adapters=adapters,
            shifts=shifts,
            float_biases=self._host.biases_changed,
        )

    def _bias_correction(self) -> None:
        guard, layers = self._guard, self._layers
        with self._watch("bias correction"):
            if self._config.bias_correction == "own":
                means = self._collector.means()
                shifts = own_shifts(layers, guard.kept.adapters, means)
            else:
                merged = merged_weights(layers, guard.kept.adapters)
                with guard.aside():
                    shifts = cascaded_shifts(self._walk(), merged)
            guard.step("bias correction", replace(guard.kept, shifts=shifts))

    def _refinement(self) -> None:
        guard, config = self._guard, self._config
        images = self._collector.split.sampled
        with self._watch("refinement"), guard.aside():
            fit = Distillation(
                config.fit, config.seed, self._host, self._layers, images, guard.trial
            )
            fitted = fit(guard.kept)
        guard.step("refinement", fitted.correction)
        self.fit_iterations, self.fit_images = fitted.iterations, fitted.images

    def _walk(self) -> Walk:
        config = self._config
        images = torch.cat(self._collector.split.sample(config.sequential_images))
        return Walk(self._host, self._layers, images, config.positions)
