"""A model's state before, during and after training, and where it is trained."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from cora_plugin.outputs import device_of


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state that training leaves alone."""
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy in place what `state_of` gave; adapters that have come or gone are left.

    Not by `load_state_dict`, at which Brevitas builds its quantizers anew: an optimizer
    would go on with the parameters of the old ones.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if name in state:
            value.copy_(state[name])


@contextmanager
def on_device(models: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it the models are on a device; they come back to where they were."""
    with ExitStack() as stack:
        for model in models:
            before = device_of(model)
            if before != device:
                model.to(device)
                stack.callback(model.to, before)
        yield
