"""Scales of weights in several processes: they stand still, and yet have gradients."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from cora_plugin.host import TrainableHost


def awaited(host: TrainableHost) -> list[nn.Parameter]:
    """Scales of weights that processes may wait for the gradients of.

    `DistributedDataParallel` sums gradients of what wanted some when it was made, which
    may be before now, and fails where one of them has none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    roles = host.roles
    return [
        parameter
        for name, parameter in host.model.named_parameters()
        if roles.get(name) == "weight_scales" and parameter.requires_grad
    ]


def with_zeros(parameter: nn.Parameter) -> Callable[[], None]:
    """Have a parameter want gradients that are zeros; what is returned ends that.

    Its own would count where gradients are clipped.
    """
    parameter.requires_grad_(True)
    remove: Callable[[], None] = parameter.register_hook(torch.zeros_like).remove
    return remove
