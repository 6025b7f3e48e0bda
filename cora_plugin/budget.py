"""What a rank costs, in each unit of a budget."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.adapter import Kind, kind_of
from cora_plugin.adapters.quantized import FLOAT_BITS
from cora_plugin.config import Budget
from cora_plugin.layer import QuantizedLayer


@dataclass(frozen=True)
class Cost:
    """Parameters, stored bits (scales counted) and multiply-accumulates an image."""

    parameters: int = 0
    bits: int = 0
    macs: int = 0

    def of(self, unit: str) -> int:
        """The number that a budget of `unit` limits."""
        return {"params": self.parameters, "bits": self.bits, "macs": self.macs}[unit]


def adapter_cost(
    layer: QuantizedLayer, rank: int, adapter_bits: int, outputs: int
) -> Cost:
    """Cost of an adapter of `rank` beside a layer with `outputs` output positions."""
    if rank == 0:
        return Cost()
    rows = layer.weight.shape[0]
    groups = layer.operation.groups
    kind = kind_of(tuple(layer.weight.shape), layer.operation, rank)
    if kind is Kind.FULL:
        parameters, scales = layer.weight.numel(), rows
        macs = parameters
    elif kind is Kind.SHARED_BASIS:
        parameters, scales = rank * (rows + layer.columns), rank + 1
        macs = layer.weight.numel()  # one convolution with the kernel BA
    else:
        parameters = rank * (rows + groups * layer.columns)
        scales = groups * rank + 1
        macs = parameters
    if adapter_bits == FLOAT_BITS:
        scales = 0
    bits = adapter_bits * parameters + FLOAT_BITS * scales
    return Cost(parameters, bits, macs * outputs)


def ladder(
    layer: QuantizedLayer, adapter_bits: int, outputs: int
) -> tuple[tuple[int, ...], tuple[Cost, ...]]:
    """Every rank worth having, and its cost.

    Factors are, while they are smaller than the residual; then the residual itself is.
    """
    shape = tuple(layer.weight.shape)
    whole = adapter_cost(layer, layer.full_rank, adapter_bits, outputs)
    rungs = {0: Cost()}
    for rank in range(1, layer.full_rank):
        cost = adapter_cost(layer, rank, adapter_bits, outputs)
        # Factors have more scales: they may be larger with fewer parameters.
        factors = kind_of(shape, layer.operation, rank) is not Kind.FULL
        if factors and cost.bits < whole.bits:
            rungs[rank] = cost
    rungs[layer.full_rank] = whole
    return tuple(rungs), tuple(rungs.values())


def stored_bits(layers: Iterable[QuantizedLayer], adapters: Iterable[Adapter]) -> float:
    """Bits of quantized weights and adapters, scales and zero points included."""
    main = sum(layer.stored_bits for layer in layers)
    return main + sum(adapter.stored_bits for adapter in adapters)


def allowance(
    budget: Budget, layers: Sequence[QuantizedLayer], outputs: Mapping[str, int]
) -> float:
    """The budget of a model as a number that `Cost.of(budget.unit)` may reach."""
    whole = sum(layer.weight.numel() for layer in layers)
    if budget.unit == "macs":
        whole = sum(layer.weight.numel() * outputs[layer.name] for layer in layers)
    return budget.amount * whole
