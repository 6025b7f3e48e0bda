"""A network as isomorphic low-bit networks whose layers add up.

FP=xINT (arXiv 2412.06865) on the level of models: each member holds one term of every
weight, and what the members' layers give is added before anything that is not linear.
Addition is associative and commutative, so members may run in any order, in threads, or
in processes of their own (AbelianAdd).
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.expansion import Series, expand
from cora_plugin.adapters.operation import PLAIN

Map = Callable[[Callable[[nn.Module], Tensor], Iterable[nn.Module]], Iterable[Tensor]]
"""Like `map`: an executor's own runs members in threads."""


class AbelianSum(nn.Module):
    """Layers of the same shape, as the sum of what they give.

    Args:
        members: The layers that this process has; all take the same input.
        each: How to run them; `ThreadPoolExecutor().map` for threads.
        group: The processes that hold the other members: one all-reduce a layer.
    """

    def __init__(
        self, members: Sequence[nn.Module], each: Map = map, group: Any = None
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._each, self._group = each, group

    def forward(self, x: Tensor) -> Tensor:
        """The sum, over processes too; without gradients, as it is for inference."""
        with torch.no_grad():
            total = reduce(add, self._each(lambda member: member(x), self.members))
            if self._group is not None:
                dist.all_reduce(total, group=self._group)
        return total


def isomorphic(
    net: nn.Module,
    bits: int,
    terms: int,
    mine: Sequence[int] | None = None,
    each: Map = map,
    group: Any = None,
) -> nn.Module:
    """A copy of a float network whose weights are series of low-bit terms.

    Args:
        net: The network; it stays as it is.
        bits: Bit width of every term, 2 to 8.
        terms: Their number, 1 or more.
        mine: Which terms this process holds; None: all. The first has all that is no
            term: offsets and biases.
        each: See `AbelianSum`.
        group: See `AbelianSum`.

    Raises:
        CoRaError: An argument is out of range, or the network has nothing to expand.
    """
    held = range(terms) if mine is None else mine
    if not held or not all(0 <= index < terms for index in held):
        raise CoRaError(
            f"isomorphic: mine={mine} of {terms} terms; name one or more of "
            f"0 to {terms - 1}"
        )
    made = copy.deepcopy(net)
    layers = [(n, m) for n, m in made.named_modules() if type(m) in PLAIN]
    if not layers:
        raise CoRaError("isomorphic: the network has no linear layer or convolution")
    for name, layer in layers:
        series = expand(layer.get_parameter("weight").detach(), bits, terms)
        members = [_member(layer, series, index) for index in held]
        owner, _, own = name.rpartition(".")
        if not name:
            return AbelianSum(members, each, group)
        setattr(made.get_submodule(owner), own, AbelianSum(members, each, group))
    return made


def _member(layer: nn.Module, series: Series, index: int) -> nn.Module:
    """The layer with one term for its weight; the first keeps the bias."""
    member = copy.deepcopy(layer).requires_grad_(False)
    weight = member.get_parameter("weight")
    weight.copy_(list(series.parts())[index])
    if index:
        member.register_parameter("bias", None)
    return member
