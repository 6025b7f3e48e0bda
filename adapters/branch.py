"""The adapter at work, in plain torch: what is added to the layer's output."""

import torch
from torch import Tensor, nn

from cora_plugin.adapters.adapter import Adapter, Kind
from cora_plugin.adapters.operation import Operation


class Branch(nn.Module):
    """Computes `B ∗ (A ∗ x)`, the adapter's share of a layer's output."""

    a: Tensor
    b: Tensor

    def __init__(self, adapter: Adapter, operation: Operation) -> None:
        super().__init__()
        self.kind = adapter.kind
        self.operation = operation
        self.weight_shape = adapter.weight_shape
        for name, tensor in adapter.tensors.items():
            self.register_buffer(name, tensor.dequantize())

    def forward(self, x: Tensor) -> Tensor:
        """[N, n, *size] to [N, m, *size'] (linear: [..., n] to [..., m])."""
        if self.kind is Kind.LOW_RANK:
            pointwise = self.operation.pointwise()
            return pointwise(self.operation(x, self.a), self.b)
        if self.kind is Kind.SHARED_BASIS:
            kernel = torch.mm(self.b, self.a).reshape(self.weight_shape)
            return self.operation(x, kernel)
        return self.operation(x, self.a)
