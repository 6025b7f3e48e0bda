"""What the hosts check alike, on plain torch."""

import pytest
import torch

from cora_plugin import CoRaError
from cora_plugin.integrations.host import given_weight


def test_a_reference_is_what_was_quantized():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    quantized = (4 * weight).round() / 4
    assert torch.equal(given_weight("a", weight.double(), quantized, ""), weight)
    for zeros in (weight.new_zeros(4, 3), 1e-30 * weight):
        assert torch.equal(given_weight("a", zeros, 0 * quantized, ""), zeros)
    for wrong, match in (
        (None, r"^a: the reference has no weight where .*\[4, 3\]; pass"),
        (weight[1:], r"^a: the reference has shape \[3, 3\] where .*\[4, 3\]; pass"),
        (0 * weight, "^a: the reference.s weight has nothing to do with .*; pass"),
        (-weight, "^a: the reference.s weight has nothing to do with .*; pass"),
    ):
        with pytest.raises(CoRaError, match=match):
            given_weight("a", wrong, quantized, "pass another")
