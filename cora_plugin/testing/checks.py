"""Helpers that tests of hosts share."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from cora_plugin.adapters import Adapter, Term
from cora_plugin.adapters.factor import Weighting, truncate
from cora_plugin.adapters.form import Form, Kind
from cora_plugin.host import Host


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Check that a model's state is what it was to the last bit; NaN is NaN."""
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        torch.testing.assert_close(
            after[name], value, rtol=0, atol=0, equal_nan=True, msg=name
        )


def float_weights(host: Host) -> AbstractContextManager[None]:
    """Float weights for every layer, activations quantized."""
    return host.acting({layer.name: layer.weight for layer in host.layers})


def whole(host: Host) -> dict[str, Adapter]:
    """Adapters that keep every residual whole, in float."""
    return series(host, 32)


def factored(host: Host) -> dict[str, Adapter]:
    """Adapters of two factors of full rank, in float."""
    return series(host, (None, 32))


def series(host: Host, *steps: int | tuple[int | None, int]) -> dict[str, Adapter]:
    """Adapters of several terms, each of what those before it leave.

    Args:
        host: Its layers get one each.
        steps: By term: a rank and bits, or bits alone for a whole term; the rank None
            is the full one.
    """
    made = {}
    for layer in host.layers:
        left, terms = layer.residual, list[Term]()
        shape, groups = tuple(layer.weight.shape), layer.operation.groups
        kind = Kind.SHARED_BASIS if layer.depthwise else Kind.LOW_RANK
        for step in steps:
            if isinstance(step, tuple):
                rank, bits = step
                form = Form(kind, rank or layer.full_rank, bits, shape, groups)
                a, b = truncate(layer.as_matrices(left), form.rank, Weighting())
                values = form.values(left, a, b)
            else:
                form, values = Form.whole(step, shape, groups), {"a": left}
            terms += Adapter.of((form,), values).terms
            left = layer.residual - Adapter(tuple(terms)).merged().double()
        made[layer.name] = Adapter(tuple(terms))
    return made
