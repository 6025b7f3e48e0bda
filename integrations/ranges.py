"""Which estimator of activation ranges a host takes where none is named."""

from collections.abc import Mapping
from typing import TypeVar

from cora_plugin.adapters.errors import ConfigError

AUTO = "auto"
"""The option's default: the estimator that suits the bit width."""

FEW_BITS = 5
"""With so many bits and fewer, a range that clips loses less than one that covers."""

T = TypeVar("T")


def estimator(
    act_range: str, act_bits: int, known: Mapping[str, T], few: str, many: str
) -> T:
    """What an option `act_range` stands for.

    Args:
        act_range: `auto`, or a key of `known`, which wins whatever the bit width.
        act_bits: Bit width of activations.
        known: A host's estimators by name.
        few: The name of the one for `FEW_BITS` and fewer.
        many: The name of the one for more.

    Raises:
        ConfigError: The name is unknown.
    """
    if act_range == AUTO:
        act_range = few if act_bits <= FEW_BITS else many
    if act_range not in known:
        names = ", ".join((AUTO, *known))
        raise ConfigError(
            ("act_range",), f"{act_range!r} is unknown; use one of {names}"
        )
    return known[act_range]
