"""What adapters cost, and how much a budget allows."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from cora_plugin.adapters import Adapter, Form
from cora_plugin.adapters.errors import BudgetError
from cora_plugin.config import Budget
from cora_plugin.layer import QuantizedLayer

MERGED_BITS = 8
"""Bits of the weights that exports for int8 kernels merge adapters into."""


def form_of(layer: QuantizedLayer, rank: int, adapter_bits: int) -> Form:
    """The form of an adapter of this rank for a layer."""
    shape, groups = tuple(layer.weight.shape), layer.operation.groups
    return Form.smallest(rank, adapter_bits, shape, groups)


def forms(
    layer: QuantizedLayer, adapter_bits: int, term_bits: Collection[int] = ()
) -> tuple[Form, ...]:
    """The forms there are: factors rank by rank, and the whole residual.

    Factors that take as many bits as the residual itself are left out.

    Args:
        layer: The layer.
        adapter_bits: Bit width of factors and of the whole residual.
        term_bits: Further bit widths of the whole residual.
    """
    whole = form_of(layer, layer.full_rank, adapter_bits)
    ranks = (form_of(layer, r, adapter_bits) for r in range(1, layer.full_rank))
    # Factors have more scales: they may be larger with fewer parameters.
    smaller = (f for f in ranks if f.factored and f.cost().bits < whole.cost().bits)
    others = (replace(whole, bits=b) for b in term_bits if b != adapter_bits)
    return tuple(sorted((*smaller, whole, *others), key=lambda f: f.cost().bits))


def ladder(
    layer: QuantizedLayer, adapter_bits: int, term_bits: Collection[int] = ()
) -> tuple[Form, ...]:
    """The forms to choose from where the layer's bit width stays.

    Left out is, for a depthwise layer of fewer bits, what would store more than its
    weight in 8 bits does: with so few weights a scale, two terms cost more than one of
    twice the bits.
    """
    found = forms(layer, adapter_bits, term_bits)
    if layer.depthwise and layer.weight_bits < MERGED_BITS:
        limit = (MERGED_BITS - layer.weight_bits) * layer.weight.numel()
        found = tuple(form for form in found if form.cost().bits <= limit)
    return found


def behind(
    found: Iterable[Form], term_bits: Collection[int]
) -> tuple[tuple[Form, Form], ...]:
    """Factors, each with a whole term of what they leave.

    Of ranks that double: what such a term leaves changes slowly with the rank. None for
    depthwise layers, which have too few weights a scale for three scales.
    """
    factored = [form for form in found if form.factored and not form.runs_merged]
    doubling = [form for form in factored if form.rank & (form.rank - 1) == 0]
    return tuple(
        (form, Form.whole(bits, form.weight_shape, form.groups))
        for form in doubling
        for bits in term_bits
    )


def stored_bits(layers: Iterable[QuantizedLayer], adapters: Iterable[Adapter]) -> float:
    """Bits of quantized weights and adapters, scales and zero points included."""
    main = sum(layer.stored_bits for layer in layers)
    return main + sum(adapter.stored_bits for adapter in adapters)


def allowance(
    budget: Budget,
    layers: Sequence[QuantizedLayer],
    positions: Mapping[str, tuple[int, int]],
) -> float:
    """The largest total of `Cost.of(budget.unit)` that a budget allows a model.

    Args:
        budget: The budget.
        layers: The layers.
        positions: Of outputs and of filters, an image, by layer.
    """
    whole = sum(layer.weight.numel() for layer in layers)
    if budget.unit == "macs":
        whole = sum(layer.weight.numel() * positions[layer.name][1] for layer in layers)
    return budget.amount * whole


def total_bits(budget: Budget, layers: Sequence[QuantizedLayer]) -> float:
    """The stored bits that a total budget allows a quantized model."""
    return (
        budget.amount
        * {
            "bits total": sum(layer.weight.numel() for layer in layers),
            "ptq": stored_bits(layers, ()),
            "MiB": 8 * 2**20,
        }[budget.unit]
    )


def added(budget: Budget, layers: Sequence[QuantizedLayer]) -> Budget | None:
    """A total budget as the bits a weight that adapters may add; None where none.

    Raises:
        BudgetError: The quantized weights alone store more.
    """
    weights = sum(layer.weight.numel() for layer in layers)
    stored, allowed = stored_bits(layers, ()), total_bits(budget, layers)
    if allowed < stored * (1 - 1e-9):
        raise BudgetError(
            f"budget: {budget} is {allowed / weights:.4g} bits a weight, and the "
            f"quantized weights alone store {stored / weights:.4g}; raise the budget, "
            "or plan bit widths with a menu"
        )
    left = (allowed - stored) / weights
    return Budget(left, "bits") if left > 1e-9 else None
