"""Types of what settings may be given as: editors complete and checkers check them.

A test compares them with the settings themselves.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from cora_plugin.config.budget import Budget
from cora_plugin.config.cora import CoRaConfig, Correction, Metric, Search
from cora_plugin.config.learning import ButterworthConfig, RefineConfig


class ButterworthSettings(TypedDict, total=False):
    """A mapping that `ButterworthConfig` is made of."""

    order: float
    gamma: float
    temperature: float
    lr: float
    initial_cutoff: float
    iterations: int
    images: int
    batch_size: int
    adapter_lr: float
    checkpoint: str | os.PathLike[str] | None


class RefineSettings(TypedDict, total=False):
    """A mapping that `RefineConfig` is made of."""

    iterations: int
    scope: Literal["model", "layer"]
    lr: float
    images: int
    batch_size: int
    every: int
    patience: int


class CoRaSettings(TypedDict, total=False):
    """A mapping that `CoRaConfig` is made of; its fields say what each is."""

    budget: Budget | str | float
    search: Search
    metric: Metric
    regression: bool
    adapter_bits: int
    terms: int
    term_bits: Sequence[int] | int | str
    ranks: Mapping[str, int]
    bias_correction: Correction | Literal[False]
    alternations: int
    refine: RefineConfig | RefineSettings | int
    sweep: Sequence[float] | float | str
    damping: float
    held_out: float
    reserve_images: int
    sensitivity_images: int
    positions: int
    sequential_images: int
    max_metric: int
    seed: int
    butterworth: ButterworthConfig | ButterworthSettings
    menu: Sequence[int] | int | str | None
    objective: str | Callable[[Any, Any], Any] | Mapping[str, Any]
    axis: int | None
    held_out_images: int


AnyConfig = (
    CoRaConfig
    | CoRaSettings
    | Mapping[str, Any]
    | str
    | os.PathLike[str]
    | float
    | bool
    | None
)
"""Everything that `CoRaConfig.of` reads: settings, the path of a file, flag text, or a
budget alone; None stands for the defaults."""
