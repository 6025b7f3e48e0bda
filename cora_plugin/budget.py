"""What adapters cost, and how much a budget allows."""

from collections.abc import Iterable, Mapping, Sequence

from cora_plugin.adapters import Adapter, Form
from cora_plugin.config import Budget
from cora_plugin.layer import QuantizedLayer

MERGED_BITS = 8
"""Bits of the weights that exports for int8 kernels merge adapters into."""


def form_of(layer: QuantizedLayer, rank: int, adapter_bits: int) -> Form:
    """The form of an adapter of this rank for a layer."""
    shape, groups = tuple(layer.weight.shape), layer.operation.groups
    return Form.smallest(rank, adapter_bits, shape, groups)


def ladder(layer: QuantizedLayer, adapter_bits: int) -> tuple[Form, ...]:
    """The forms to choose from: factors rank by rank, then the whole residual.

    Factors that take as many bits as the residual itself are left out; so is, for a
    depthwise layer of fewer bits, what would store more than its weight in 8 bits does:
    with so few weights a scale, two terms cost more than one of twice the bits.
    """
    whole = form_of(layer, layer.full_rank, adapter_bits)
    forms = (form_of(layer, r, adapter_bits) for r in range(1, layer.full_rank))
    # Factors have more scales: they may be larger with fewer parameters.
    smaller = (f for f in forms if f.factored and f.cost().bits < whole.cost().bits)
    found = (*smaller, whole)
    if layer.depthwise and layer.weight_bits < MERGED_BITS:
        limit = (MERGED_BITS - layer.weight_bits) * layer.weight.numel()
        found = tuple(form for form in found if form.cost().bits <= limit)
    return found


def stored_bits(layers: Iterable[QuantizedLayer], adapters: Iterable[Adapter]) -> float:
    """Bits of quantized weights and adapters, scales and zero points included."""
    main = sum(layer.stored_bits for layer in layers)
    return main + sum(adapter.stored_bits for adapter in adapters)


def allowance(
    budget: Budget, layers: Sequence[QuantizedLayer], outputs: Mapping[str, int]
) -> float:
    """The largest total of `Cost.of(budget.unit)` that a budget allows a model."""
    whole = sum(layer.weight.numel() for layer in layers)
    if budget.unit == "macs":
        whole = sum(layer.weight.numel() * outputs[layer.name] for layer in layers)
    return budget.amount * whole
