"""How far a model is from its float original."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cora_plugin.layer import Host


@dataclass(frozen=True)
class Divergence:
    """Mean KL(float ‖ model) in nats, and the share of equal decisions."""

    kl: float
    agreement: float


@torch.no_grad()
def outputs(host: Host, batches: Sequence[Tensor]) -> Tensor:
    """The outputs of the model for all batches, [N, classes, …]."""
    return torch.cat([host.run(batch) for batch in batches])


def divergence(reference: Tensor, output: Tensor) -> Divergence:
    """Compare outputs (logits) [N, classes, …] with the float model's.

    A non-finite output has an infinite divergence.
    """
    p = reference.double().log_softmax(1)
    q = output.double().log_softmax(1)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    same = (reference.argmax(1) == output.argmax(1)).double().mean()
    return Divergence(kl if kl == kl else float("inf"), float(same))
