"""Changes to a model that last for a block and are undone on every way out of it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have one module answer its calls with another function."""
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter want a gradient."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def parameter_values(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give some parameters other values."""
    before = {}
    try:
        for name, value in values.items():
            parameter = model.get_parameter(name)
            before[name] = parameter.data
            parameter.data = value
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value


@contextmanager
def kept_parameters(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Leave some parameters as they were if the block fails."""
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    try:
        yield
    except BaseException:
        for name, value in before.items():
            model.get_parameter(name).data.copy_(value)
        raise
