"""Alternates between the main weight and its adapter (LoftQ, arXiv 2310.08659)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from cora_plugin.adapters import Adapter, Factors
from cora_plugin.adapters.exact import exact
from cora_plugin.adapters.factor import Weighting, weighted_error
from cora_plugin.host import Host
from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.progress import counter


def alternate(
    host: Host,
    layers: Sequence[QuantizedLayer],
    adapters: Mapping[str, Adapter],
    metrics: Mapping[str, Weighting],
    times: int,
) -> Correction:
    """Quantize what the adapter leaves, `Wq ← Q(W − BA)`, and solve for BA again.

    Two chains of iterates are followed: from the present adapter, as in LoftQ, and from
    the best one for the weight itself, as in SVDQuant (arXiv 2411.05007). Each layer
    keeps the iterate with the least error in the metric, perhaps the present one.

    Args:
        host: Quantizes weights.
        layers: The layers.
        adapters: Their adapters by name.
        metrics: The metrics of their factors by name.
        times: Iterates of each chain.

    Returns:
        All adapters; for the layers that changed, also the float weights to quantize
        and what the host's quantizers make of them.

    Raises:
        ModelError: The host's main weights must stay as they are.
    """
    low_rank = [
        e for e in layers if e.name in adapters and _is_one_product(adapters[e.name])
    ]
    best = {e.name: _error(e, adapters[e.name], metrics[e.name]) for e in low_rank}
    chosen, weights, dequantized = dict(adapters), {}, {}
    starts = [
        {e.name: adapters[e.name] for e in low_rank},
        {e.name: _again(exact(e.weight), e, adapters, metrics) for e in low_rank},
    ]
    progress = counter("alternation", "iterate", 2 * times)
    for chain in starts:
        for _ in range(times):
            left = {
                e.name: e.weight - chain[e.name].merged().to(e.weight) for e in low_rank
            }
            quantized = host.quantize(left)
            for layer in low_rank:
                name = layer.name
                now = replace(layer, dequantized=quantized[name])
                chain[name] = _again(now.residual, now, adapters, metrics)
                error = _error(now, chain[name], metrics[name])
                if error < best[name]:
                    best[name] = error
                    chosen[name], weights[name] = chain[name], left[name]
                    dequantized[name] = now.dequantized
            progress.update()
    progress.close()
    return Correction(chosen, weights=weights, dequantized=dequantized)


def _is_one_product(adapter: Adapter) -> bool:
    """Whether it can be solved for again: a closed form gives one pair of factors."""
    forms = adapter.forms
    return len(forms) == 1 and forms[0].factored


def _again(
    residual: Tensor,
    layer: QuantizedLayer,
    adapters: Mapping[str, Adapter],
    metrics: Mapping[str, Weighting],
) -> Adapter:
    stood = adapters[layer.name]
    metric = metrics[layer.name]
    factors = Factors.of(residual, layer.operation, metric, layer.name)
    return factors.adapter(stood.rank, stood.forms[0].bits, layer.name)


def _error(layer: QuantizedLayer, adapter: Adapter, metric: Weighting) -> float:
    left = layer.residual - exact(adapter.merged())
    return weighted_error(layer.as_matrices(left), metric)
