"""What the hosts check alike, on plain torch."""

import pytest
import torch
from torch import nn

from cora_plugin import CoRaError
from cora_plugin.integrations.host import given_weight, run_model


class Answering(nn.Module):
    """Answers with what a function makes of its logits."""

    def __init__(self, answer):
        super().__init__()
        self.head = nn.Linear(3, 2).double()
        self.answer = answer

    def forward(self, x):
        return self.answer(self.head(x))


@pytest.mark.parametrize("answer", [lambda y: y, lambda y: (y,), lambda y: [y]])
def test_logits_alone_or_in_a_tuple_of_one(answer):
    net, x = Answering(answer), torch.randn(4, 3)
    expected = net.head(x.double())  # The images take on the model's dtype.
    assert torch.equal(run_model(net, x), expected)
    assert torch.equal(run_model(net, x, torch.neg), -expected)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda y: (y, y), "tuple"),
        (lambda y: {"logits": y}, "dict"),
        (lambda y: y.sum(), "Tensor"),
    ],
)
def test_other_outputs_are_refused(answer, kind):
    match = f"the model's output is {kind}, not logits .*one tensor"
    with pytest.raises(CoRaError, match=match):
        run_model(Answering(answer), torch.randn(4, 3))


def test_a_reference_is_what_was_quantized():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    quantized = (4 * weight).round() / 4
    assert torch.equal(given_weight("a", weight.double(), quantized, ""), weight)
    for wrong, match in (
        (None, r"^a: the reference has no weight where .*\[4, 3\]; pass"),
        (weight[1:], r"^a: the reference has shape \[3, 3\] where .*\[4, 3\]; pass"),
        (-weight, "^a: the reference.s weight has nothing to do with .*; pass"),
    ):
        with pytest.raises(CoRaError, match=match):
            given_weight("a", wrong, quantized, "pass another")
