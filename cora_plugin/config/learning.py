"""Settings of the steps that learn by gradient: a search and the refinement."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from cora_plugin.config.declared import setting, settings


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@settings("butterworth")
@dataclass(frozen=True)
class ButterworthConfig:
    """How the `butterworth` search learns its cutoffs."""

    order: float = setting(4, "steepness of the kernel at the cutoff", above=0)
    gamma: float = setting(
        1.0, "weight of the penalty on what exceeds the budget", least=0
    )
    temperature: float = setting(1.0, "softens the outputs that are compared", above=0)
    lr: float = setting(0.01, "learning rate of Adam", above=0)
    initial_cutoff: float = setting(
        0.1,
        "share of each full rank at the start; 0.9 needs some 100 iterations to come "
        "down",
        above=0,
        greatest=1,
    )
    iterations: int = setting(250, "steps of Adam", least=1)
    images: int = setting(
        1600,
        "calibration images to learn on, at most; they are kept in memory",
        least=1,
    )
    batch_size: int = setting(16, "images a step", least=1)
    adapter_lr: float = setting(
        0.0,
        "train the adapters too, at this learning rate relative to their size; 0: do "
        "not train them",
        least=0,
    )
    checkpoint: str | None = setting(
        None,
        "a file for the state, from which an interrupted search is resumed",
        read=_path,
    )


@settings("refine")
@dataclass(frozen=True)
class RefineConfig:
    """How adapters and biases are refined by distillation, once they are in place."""

    iterations: int = setting(
        0,
        "refine adapters and biases by distillation: steps of Adam, for example 100; "
        "0: none",
        least=0,
    )
    scope: Literal["model", "layer"] = setting(
        "model", "match the network's outputs; `layer`: match each layer's own"
    )
    lr: float = setting(
        0.001,
        "learning rate of Adam, relative to the size of what is changed",
        above=0,
    )
    images: int = setting(
        512,
        "calibration images to learn on, at most; they are kept in memory",
        least=1,
    )
    batch_size: int = setting(16, "images a step", least=1)
    every: int = setting(
        10, "iterations between measurements on the held-out images", least=1
    )
    patience: int = setting(
        5, "stop after so many measurements without improvement", least=1
    )
