"""What hosts share where models are trained: codes of weights, and gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import ModelError
from cora_plugin.host import Latent


def latent(
    name: str,
    weight: nn.Parameter,
    positions: Callable[[], Tensor],
    lowest: float,
    highest: float,
) -> Latent:
    """A latent weight whose codes are its positions, rounded.

    Args:
        name: The layer.
        weight: Its weight.
        positions: The weight in units of its steps, within its range.
        lowest: The lowest code that is possible.
        highest: The highest one.
    """
    # Of 0 to 255 those in the middle are 0, so that a byte holds them.
    middle = (lowest + highest + 1) // 2 if lowest >= 0 else 0
    dtype = torch.int8 if highest - middle <= 127 else torch.int32

    @torch.no_grad()
    def levels() -> Tensor:
        codes = positions().round_()
        return (codes.sub_(middle) if middle else codes).to(dtype)

    return Latent(name, weight, levels, torch.no_grad()(positions))


class Training:
    """Within it some parameters want gradients and others do not: the latent weights.

    Weights that want none already stay as they are, for their layers are frozen; where
    none does, the whole model was loaded to be run, and all are trained.

    Not a generator, whose end would come with the garbage collector, too, in the middle
    of whatever runs then.

    Args:
        latents: The latent weights; of those that share a weight the first counts.
        still: Parameters that are to want no gradients.
    """

    def __init__(
        self, latents: Sequence[Latent], still: Iterable[nn.Parameter]
    ) -> None:
        moving = [each for each in latents if each.weight.requires_grad] or latents
        self._latents = distinct(moving)
        self._wanted = dict.fromkeys(still, False)
        self._wanted |= {each.weight: True for each in moving}
        self._before: dict[nn.Parameter, bool] = {}

    def __enter__(self) -> Sequence[Latent]:
        self._before = {each: each.requires_grad for each in self._wanted}
        _want_gradients(self._wanted)
        return self._latents

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _want_gradients(self._before)


def _want_gradients(wanted: Mapping[nn.Parameter, bool]) -> None:
    for parameter, on in wanted.items():
        parameter.requires_grad_(on)


def distinct(latents: Sequence[Latent]) -> list[Latent]:
    """The first of those that share a weight."""
    first: dict[nn.Parameter, Latent] = {}
    for each in latents:
        first.setdefault(each.weight, each)
    return list(first.values())


def refuse_without_latents(
    found: Sequence[Latent], obstacles: Mapping[str, str]
) -> None:
    """Refuse to train a model without a weight that could be.

    Raises:
        ModelError: There is none.
    """
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in obstacles.items())
        raise ModelError(
            "the model has no quantized weight that can be trained "
            f"({reasons or 'nothing in it is quantized'}); quantize it with the "
            "toolkit first, and pass the quantized model"
        )
