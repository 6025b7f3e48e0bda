"""The residuals of layers: their spectra, their factors, and rows of the report."""

from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor

from cora_plugin.adapters import Adapter, Factors, Form
from cora_plugin.adapters.exact import exact
from cora_plugin.adapters.factor import Weighting, removed_error, weighted_error
from cora_plugin.adapters.factors import series
from cora_plugin.config import CoRaConfig
from cora_plugin.layer import QuantizedLayer
from cora_plugin.progress import bar
from cora_plugin.report import LayerReport
from cora_plugin.search import Treatment
from cora_plugin.statistics import LayerStatistics


class Residuals:
    """The residuals of layers, each factored once: an adapter is a slice of them.

    Args:
        config: The settings.
        layers: The layers as the host quantized them.
        statistics: Of these layers, by name.
    """

    def __init__(
        self,
        config: CoRaConfig,
        layers: Sequence[QuantizedLayer],
        statistics: Mapping[str, LayerStatistics],
    ) -> None:
        self._config = config
        self._statistics = statistics
        self.layers = layers

    @cached_property
    def spectra(self) -> Mapping[str, tuple[float, ...]]:
        """The error that each further rank of a layer would remove, by layer."""
        return {
            e.name: tuple(removed_error(e.matrices, self.observed(e)).tolist())
            for e in bar(self.layers, "spectra", "layer", brief=True)
        }

    @cached_property
    def factors(self) -> Mapping[str, Factors]:
        """The residuals' factors, by layer."""
        layers = bar(self.layers, "factors", "layer", brief=True)
        return {layer.name: self.factors_of(layer) for layer in layers}

    def factors_of(self, layer: QuantizedLayer) -> Factors:
        """The factors of one layer's residual."""
        metric = self.metric(layer)
        return Factors.of(layer.residual, layer.operation, metric, layer.name)

    def error_after(self, layer: QuantizedLayer, adapter: Adapter) -> float:
        """The error that a layer's adapter leaves, in the unit of `spectra`."""
        left = layer.residual - adapter.merged().to(layer.residual)
        return weighted_error(layer.as_matrices(left), self.observed(layer))

    def left_by(self, layer: QuantizedLayer, terms: Sequence[Form]) -> float:
        """The error that terms leave, the last of the layer's own shape."""
        if terms[0].factored:
            adapter = self.factors[layer.name].adapter_of(terms)
        else:
            adapter = series(layer.residual, terms)
        return self.error_after(layer, adapter)

    @cached_property
    def positions(self) -> Mapping[str, tuple[int, int]]:
        """Output positions an image, and positions of filters, by layer."""
        return {n: (each.outputs, each.slides) for n, each in self._statistics.items()}

    @property
    def sensitivities(self) -> Mapping[str, Tensor | None]:
        """Curvatures of the loss at the outputs, where they were collected."""
        return {name: each.sensitivity for name, each in self._statistics.items()}

    def metric(self, layer: QuantizedLayer) -> Weighting:
        """The metric that a layer's factors are optimal in."""
        return self._statistics[layer.name].metric(layer, self._config)

    def observed(self, layer: QuantizedLayer) -> Weighting:
        """The metric that errors are measured in."""
        return self._statistics[layer.name].observed(layer, self._config)

    def adapters(
        self,
        treatments: Mapping[str, Treatment],
        trained: Mapping[str, Factors] | None = None,
    ) -> dict[str, Adapter]:
        """The adapters of treatments, by layer; none where there is no term.

        Args:
            treatments: By layer name.
            trained: Factors that a search has trained, in place of these.
        """
        factors = {**self.factors, **(trained or {})}
        return {
            name: factors[name].adapter_of(treatment.forms)
            for name, treatment in treatments.items()
            if treatment.forms
        }

    def row(self, layer: QuantizedLayer, adapter: Adapter | None) -> LayerReport:
        """A layer's row of the report.

        Args:
            layer: The layer, with its present main weight.
            adapter: Its adapter; None if it has none.
        """
        spectrum = self.spectra[layer.name]
        before = after = sum(spectrum)
        bits = layer.stored_bits
        macs = 0
        if adapter is not None:
            left = layer.residual - exact(adapter.merged())
            matrices = layer.as_matrices(left)
            after = weighted_error(matrices, self.observed(layer))
            bits += adapter.stored_bits
            macs = adapter.cost(*self.positions[layer.name]).macs
        return LayerReport(
            name=layer.name,
            kind="none" if adapter is None else adapter.kinds,
            rank=0 if adapter is None else adapter.rank,
            full_rank=layer.full_rank,
            weights=layer.weight.numel(),
            parameters=0 if adapter is None else adapter.parameters,
            adapter_bits=0 if adapter is None else adapter.stored_bits,
            bits=bits / layer.weight.numel(),
            macs=macs,
            error_before=before,
            error_after=after,
            spectrum=spectrum,
            weight_bits=layer.weight_bits,
        )
