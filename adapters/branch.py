"""Runs an adapter in plain torch."""

from functools import reduce
from operator import add

from torch import Tensor, nn

from cora_plugin.adapters.adapter import Adapter, by_term
from cora_plugin.adapters.operation import Operation


class Branch(nn.Module):
    """Computes what an adapter adds to its layer's output, such as `B ∗ (A ∗ x)`."""

    def __init__(self, adapter: Adapter, operation: Operation) -> None:
        super().__init__()
        self.forms = adapter.forms
        self.operation = operation
        for name, tensor in adapter.tensors.items():
            self.register_buffer(name, tensor.dequantize())

    def forward(self, x: Tensor) -> Tensor:
        """[N, n, *size] to [N, m, *size'] (linear: [..., n] to [..., m])."""
        terms = by_term(self.forms, dict(self.named_buffers()))
        shares = (form.run(self.operation, x, stored) for form, stored in terms)
        return reduce(add, shares)
