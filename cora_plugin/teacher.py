"""Another model's outputs in place of the float weights' as what is to be reached."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.outputs import Batch, Outputs, device_of, moved, run

Teacher = Callable[[Batch], Outputs]
"""The outputs that are to be reached for a batch of the model's arguments."""

KEY = ("teacher",)


@contextmanager
def teaching(
    teacher: nn.Module | None,
    student: nn.Module,
    unpack: Callable[[Any], Any] = lambda value: value,
) -> Iterator[Teacher | None]:
    """Within it a model teaches: it is in evaluation mode, and wants no gradients.

    Args:
        teacher: The model, on any device; None: none.
        student: The quantized model, whose device its outputs go to.
        unpack: Turns an output of the toolkit's own type into a tensor.

    Raises:
        ConfigError: The teacher is the student itself.
    """
    if teacher is None:
        yield None
        return
    if teacher is student:
        raise ConfigError(
            KEY,
            "it is the model that is to be changed, whose outputs change with it; pass "
            "another model, such as copy.deepcopy(model)",
        )
    modes = {module: module.training for module in teacher.modules()}

    @torch.no_grad()
    def teach(batch: Batch) -> Outputs:
        outputs: Outputs = moved(run(teacher, batch, unpack), device_of(student))
        return outputs

    teacher.eval()
    try:
        yield teach
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_taught(taught: Outputs, outputs: Outputs) -> None:
    """Check that a teacher's outputs are those of the model, by name and shape.

    Raises:
        ConfigError: They are not.
    """
    found, wanted = (
        {name: list(value.shape) for name, value in each.items()}
        for each in (taught, outputs)
    )
    if found != wanted:
        raise ConfigError(
            KEY,
            f"its outputs for a batch are {_told(found)}, and the model's "
            f"{_told(wanted)}; wrap the teacher so that its forward returns the same",
        )


def _told(shapes: dict[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())
