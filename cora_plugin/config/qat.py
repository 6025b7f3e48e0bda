"""Settings of training a quantized model: `qat.finetune`, and a recipe's `qat:`."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.config.declared import setting, settings

FIRST_RATES = {"sgd": 0.01, "adam": 1e-3, "adamw": 3e-4, "nadam": 1e-3}
"""The first learning rate of latent weights, by optimizer, where none is given."""


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


@settings("qat")
@dataclass(frozen=True)
class QATConfig:
    """How a quantized model is trained on.

    If you are not sure what to use, set the epochs and leave the rest.

    Raises:
        ConfigError: A setting is unknown or its value impossible.
    """

    method: Literal["trs", "lr"] = setting(
        "trs",
        "what is scheduled: `trs`, the rate at which weights change their codes; `lr`, "
        "the learning rate of everything, scales of weights included",
    )
    epochs: int = setting(1, "passes over the training images", least=1)
    optimizer: Literal["sgd", "adam", "adamw", "nadam"] = setting(
        "adamw", "the optimizer"
    )
    lr: float | None = setting(
        None,
        "the first learning rate of latent weights; null: 0.01 for sgd, 3e-4 for "
        "adamw, 1e-3 for the others",
        above=0,
    )
    other_lr: float | None = setting(
        None, "that of all else, which falls as a cosine; null: the same", above=0
    )
    adapter_lr: float | None = setting(
        None, "that of adapters; null: as `other_lr`", above=0
    )
    momentum: float = setting(0.9, "of sgd", least=0, below=1)
    weight_decay: float = setting(0.0, "of latent weights", least=0)
    target: float = setting(
        5e-3,
        "the first target rate, the share of weights that change codes in a step",
        above=0,
        below=1,
    )
    schedule: Literal["cosine", "linear", "step"] = setting(
        "cosine", "how the target falls"
    )
    warmup: int = setting(0, "steps in which the target rises", least=0)
    rate_momentum: float | None = setting(
        None,
        "momentum of the running rate; null: 0.99, less in fewer than 10,000 steps",
        least=0,
        below=1,
    )
    eta: float | None = setting(
        None,
        "how strongly the learning rate follows the rate (the paper: the first one); "
        "null: by the rate that it brings",
        above=0,
    )
    window: int | None = setting(
        None,
        "a weight oscillates that goes back within so many steps; null: 100, at most a "
        "tenth of all; 0: not watched",
        least=0,
    )
    labels: float = setting(
        0.0,
        "share of the loss that is cross-entropy to labels, the second of a batch; the "
        "rest is the distance to the float model",
        least=0,
        greatest=1,
    )
    norms: Literal["frozen", "estimated"] = setting(
        "frozen",
        "batch norms: `frozen` keep their statistics; `estimated` use each batch's, "
        "and those for inference are measured anew at the end",
    )
    adapters: Literal["train", "keep", "resolve"] = setting(
        "train",
        "adapters: `train` along; `keep` as they are; `resolve`, after training, solve "
        "them again for the trained weights in the same budget, if that is better",
    )
    clip: float | None = setting(None, "largest norm of all gradients", above=0)
    accumulate: int = setting(1, "batches a step", least=1)
    autocast: Literal["bfloat16"] | None = setting(
        None, "a type for what may be computed in fewer bits"
    )
    every: int = setting(
        0, "steps between measurements on held-out images; 0: an epoch", least=0
    )
    patience: int = setting(
        5, "stop after so many measurements without improvement", least=1
    )
    checkpoint: str | None = setting(
        None,
        "a file for the state, from which an interrupted training is resumed",
        read=_path,
    )

    @property
    def first_lr(self) -> float:
        """The first learning rate of latent weights."""
        return FIRST_RATES[self.optimizer] if self.lr is None else self.lr

    @property
    def rest_lr(self) -> float:
        """The learning rate of all else."""
        return self.first_lr if self.other_lr is None else self.other_lr

    @classmethod
    def of(cls, value: Any = None, **settings: Any) -> "QATConfig":
        """A config from itself, a mapping or None, with some settings replaced.

        Raises:
            ConfigError: A setting is unknown or its value impossible.
        """
        if value is None:
            return cls(**settings)
        if isinstance(value, cls):
            return cls(**{**vars(value), **settings})
        if isinstance(value, dict):
            return cls(**{**value, **settings})
        raise ConfigError(
            ("qat",), f"{value!r} is not a configuration; pass a QATConfig or a dict"
        )
