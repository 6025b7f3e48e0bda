"""Other parameter values for the length of a block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn


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
