"""Images in memory, and the outputs of models for them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from cora_plugin.adapters.errors import CoRaError, DataError, ModelError
from cora_plugin.adapters.operation import first_nonfinite
from cora_plugin.integrations.doing import in_a_line
from cora_plugin.outputs import device_of
from cora_plugin.progress import bar, quiet
from cora_plugin.recipe.images import Item

BATCH = 64
"""Test images that are in memory at once."""


def loaded(
    images: Subset[Item], batch_size: int, console: Console
) -> "DataLoader[tuple[Tensor, ...]]":
    """All images in memory: a toolkit walks them once for every layer.

    Raises:
        DataError: They are not all of one size and type.
    """
    with quiet(console, "loading"):
        numbers = bar(range(len(images)), "calibration images", "image")
        items = [images[number] for number in numbers]
    pixels, targets = _joined("calibration images", items, 0, images)
    return DataLoader(TensorDataset(pixels, targets), batch_size)


@torch.no_grad()
def plainly(net: nn.Module, images: Tensor) -> Tensor:
    """Outputs of the float model.

    Raises:
        DataError: It does not run with the images.
        ModelError: It gives something else than one tensor.
    """
    try:
        outputs: Any = net(images.to(device_of(net)))
    except CoRaError:
        raise
    except Exception as error:
        raise DataError(
            f"test images: the float model does not run with {list(images.shape)} of "
            f"{images.dtype}: {in_a_line(error)}; see that they are preprocessed as "
            "it expects them"
        ) from error
    if not (
        isinstance(outputs, Tensor)
        and outputs.ndim > 1
        and len(outputs) == len(images)
        and outputs.is_floating_point()
    ):
        made = f"a {type(outputs).__name__}"
        if isinstance(outputs, Tensor):
            made = f"{list(outputs.shape)} of {outputs.dtype}"
        raise ModelError(
            f"model: for {len(images)} images it gives {made}; a recipe takes models "
            "that give one tensor [N, …] of floats, so return that one, or use "
            "quantize_ptq and apply_cora"
        )
    answer: Tensor = outputs.to(images.device)
    return answer


def outputs_of(
    logits: Callable[[nn.Module, Tensor], Tensor],
    model: nn.Module,
    images: Subset[Item],
    what: str,
    console: Console,
) -> tuple[Tensor, Tensor]:
    """Outputs [N, classes, …] for all test images, and their labels [N].

    Args:
        logits: Runs the model on a batch; `plainly` where it is the float one.
        model: The model.
        images: The images.
        what: What the model is called.
        console: Where progress goes.

    Raises:
        DataError: The images are not finite, not of one kind, or the float model does
            not run with them.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    with quiet(console, f"testing, {what}"):
        for first in bar(range(0, len(images), BATCH), "images", "batch"):
            numbers = range(first, min(first + BATCH, len(images)))
            items = [images[number] for number in numbers]
            x, y = _joined("test images", items, first, images)
            _refuse_nonfinite(x, first, images, "holds")
            answer = logits(model, x)
            if logits is plainly:
                _refuse_nonfinite(answer, first, images, "makes the float model give")
            pairs.append((answer, y))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _joined(
    what: str, items: Sequence[Item], first: int, images: Subset[Item]
) -> tuple[Tensor, Tensor]:
    """Images [N, …] and their labels [N].

    Args:
        what: What errors call them.
        items: Each an image and its label.
        first: The number of images before them.
        images: All of them.

    Raises:
        DataError: They are not all of one size and type.
    """
    kinds = [f"{list(x.shape)} of {x.dtype}" for x, _ in items]
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is not None:
        names = [_name(images, first + index) for index in (0, other)]
        raise DataError(
            f"{what}: {names[0]} is {kinds[0]}, and {names[1]} {kinds[other]}; make "
            "all of one size and type"
        )
    return torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])


def _name(images: Subset[Item], number: int) -> str:
    dataset: Any = images.dataset
    name: str = dataset.name_of(images.indices[number])
    return name


def _refuse_nonfinite(
    values: Tensor, first: int, images: Subset[Item], does: str
) -> None:
    """Refuse test images that are not finite, or whose float outputs are not.

    Args:
        values: A batch of images or outputs.
        first: The number of images before it.
        images: All of them.
        does: What an image does where its values are not finite.

    Raises:
        DataError: There is one.
    """
    if first_nonfinite(values) is None:
        return
    bad = next(i for i, each in enumerate(values) if first_nonfinite(each))
    name = _name(images, first + bad)
    raise DataError(f"test images: {name} {does} {first_nonfinite(values[bad])}")
