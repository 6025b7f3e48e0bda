"""Alternates between the main weight and its adapter (LoftQ, arXiv 2310.08659)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from cora_plugin.adapters import Adapter, Factors
from cora_plugin.adapters.adapter import Kind
from cora_plugin.adapters.factor import Weighting, weighted_error
from cora_plugin.layer import Host, QuantizedLayer


def alternate(
    host: Host,
    layers: Sequence[QuantizedLayer],
    adapters: Mapping[str, Adapter],
    metrics: Mapping[str, Weighting],
    times: int,
) -> tuple[dict[str, Adapter], dict[str, Tensor], list[QuantizedLayer]]:
    """Quantize what the adapter leaves, `Wq ← Q(W − BA)`, and solve for BA again.

    Two chains of iterates are followed: from the adapter that stands, as LoftQ has it,
    and from the best one for the weight itself, as SVDQuant (arXiv 2411.05007) has. The
    iterate with the least error in the metric stays, which may be the one that stood.

    Args:
        host: Quantizes weights.
        layers: The layers.
        adapters: Their adapters by name.
        metrics: The metrics of their factors by name.
        times: Iterates of each chain.

    Returns:
        Adapters by layer name, all of them; of the layers that changed, the float
        weights to quantize; and the layers with their new main weights.

    Raises:
        CoRaError: The host's main weights must stay as they are.
    """
    low_rank = [
        e
        for e in layers
        if e.name in adapters and adapters[e.name].kind is not Kind.FULL
    ]
    best = {e.name: (_error(e, adapters[e.name], metrics[e.name]), e) for e in low_rank}
    chosen, weights = dict(adapters), {}
    starts = [
        {e.name: adapters[e.name] for e in low_rank},
        {e.name: _again(e.weight.double(), e, adapters, metrics) for e in low_rank},
    ]
    progress = tqdm(total=2 * times, desc="alternation", unit="iterate", disable=None)
    for chain in starts:
        for _ in range(times):
            left = {
                e.name: e.weight - chain[e.name].merged().to(e.weight) for e in low_rank
            }
            quantized = host.requantize(left)
            for layer in low_rank:
                name = layer.name
                now = replace(layer, dequantized=quantized[name])
                chain[name] = _again(now.residual, now, adapters, metrics)
                error = _error(now, chain[name], metrics[name])
                if error < best[name][0]:
                    best[name] = error, now
                    chosen[name], weights[name] = chain[name], left[name]
            progress.update()
    progress.close()
    changed = {name: layer for name, (_, layer) in best.items()}
    return chosen, weights, [changed.get(e.name, e) for e in layers]


def _again(
    residual: Tensor,
    layer: QuantizedLayer,
    adapters: Mapping[str, Adapter],
    metrics: Mapping[str, Weighting],
) -> Adapter:
    stood = adapters[layer.name]
    metric = metrics[layer.name]
    factors = Factors.of(residual, layer.operation, metric, layer.name)
    return factors.adapter(stood.rank, stood.a.bits, layer.name)


def _error(layer: QuantizedLayer, adapter: Adapter, metric: Weighting) -> float:
    left = layer.residual - adapter.merged().double()
    return weighted_error(layer.as_matrices(left), metric)
