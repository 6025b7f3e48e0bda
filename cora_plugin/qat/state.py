"""A model's state before, during and after training, and where it is trained."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from cora_plugin import processes
from cora_plugin.adapters.errors import ModelError
from cora_plugin.outputs import device_of


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's state that training leaves alone."""
    return {
        name: value.detach().cpu().clone()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def settle(model: nn.Module) -> None:
    """Have a model's parameters be what its state says, to be trained and restored.

    Brevitas measures the ranges of activations in the first passes of a training: its
    state has what was measured so far, which becomes the parameter when it is loaded.

    Raises:
        ModelError: Nothing was measured yet.
    """
    state = model.state_dict(keep_vars=True)
    stored = {id(value) for value in state.values()}
    for name, parameter in model.named_parameters():
        # Of another name there in NNCF.
        if name not in state and id(parameter) not in stored:
            raise ModelError(
                f"{name}: has no value yet; calibrate the model first, as its toolkit "
                "has it"
            )
    held = {*map(id, model.parameters()), *map(id, model.buffers())}
    for name, value in state.items():
        if isinstance(value, Tensor) and id(value) not in held:
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.load_state_dict(owner.state_dict())


@torch.no_grad()
def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy in place what `state_of` gave; adapters that have come or gone are left.

    Not by `load_state_dict`, at which Brevitas builds its quantizers anew: an optimizer
    would go on with the parameters of the old ones.
    """
    for name, value in model.state_dict(keep_vars=True).items():
        if name in state:
            value.copy_(state[name])


def same_everywhere(model: nn.Module) -> None:
    """Have a model's state be that of the first process."""
    state = model.state_dict(keep_vars=True).values()
    held = [value for value in state if isinstance(value, Tensor) and value.numel()]
    processes.from_first("the model", held)


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
