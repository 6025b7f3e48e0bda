"""The settings of CoRa: from keyword arguments, a mapping, YAML or a flag's text."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cora_plugin.adapters.errors import CoRaError

METRICS = ("svd", "lqer", "qera-approx", "qera-exact")
SEARCHES = ("uniform", "spectral", "butterworth")
UNITS = ("params", "bits", "macs")


@dataclass(frozen=True)
class Budget:
    """How much the adapters of a whole model may cost.

    Units: `params` is the fraction of the quantized weights' number, `bits` what the
    adapters add to the equivalent bit width (bits a quantized weight, scales counted),
    `macs` the fraction of the quantized layers' multiply-accumulates.
    """

    amount: float
    unit: str = "params"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise CoRaError(
                f"budget: unit {self.unit!r} is unknown; use one of {', '.join(UNITS)}"
            )
        _number("budget", self.amount)
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise CoRaError(
                f"budget: {self.amount} is not a positive amount; pass for example "
                "'0.05 params' (to use no adapters, leave the plugin off)"
            )

    @classmethod
    def parse(cls, value: Any) -> "Budget":
        """Read `0.05`, `"0.05"`, `"0.05 params"`, `"5%"` or `"0.2 bits"`."""
        if isinstance(value, cls):
            return value
        parts = str(value).split()
        try:
            if isinstance(value, bool) or not 1 <= len(parts) <= 2:
                raise ValueError
            number = parts[0]
            percent = number.endswith("%")
            amount = float(number.removesuffix("%")) / (100 if percent else 1)
        except ValueError:
            raise CoRaError(
                f"budget: {value!r} is not an amount with a unit; pass for example "
                "'0.05 params', '0.2 bits' or '0.05 macs'"
            ) from None
        return cls(amount, *parts[1:])

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{float(self.amount)!r} {self.unit}"


@dataclass(frozen=True)
class ButterworthConfig:
    """How the `butterworth` search learns its cutoffs.

    Args:
        order: Order of the kernel; the higher, the steeper it falls at the cutoff.
        gamma: Weight of the penalty on what the cutoffs cost beyond the budget.
        temperature: Softens the outputs that are compared.
        lr: Learning rate of Adam.
        initial_cutoff: The share of each full rank that is kept at the start.
        iterations: Steps of Adam.
        images: Calibration images kept in memory to learn on, at most.
        batch_size: Images a step.
    """

    order: float = 4
    gamma: float = 1.0
    temperature: float = 1.0
    lr: float = 0.01
    initial_cutoff: float = 0.1
    iterations: int = 250
    images: int = 1600
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("order", "temperature", "lr", "initial_cutoff", "gamma"):
            value = getattr(self, name)
            _number(f"butterworth.{name}", value)
            _check(math.isfinite(value), f"butterworth.{name}", value, "a finite one")
            if name != "gamma":
                _check(value > 0, f"butterworth.{name}", value, "more than 0")
        _check(self.gamma >= 0, "butterworth.gamma", self.gamma, "0 or more")
        share = self.initial_cutoff
        _check(share <= 1, "butterworth.initial_cutoff", share, "at most 1")
        for name in ("iterations", "images", "batch_size"):
            value = getattr(self, name)
            _whole(f"butterworth.{name}", value)
            _check(value >= 1, f"butterworth.{name}", value, "1 or more")

    @classmethod
    def of(cls, value: Any) -> "ButterworthConfig":
        """Read a mapping, or take the settings as they are.

        Raises:
            CoRaError: A key is unknown or a value impossible.
        """
        if isinstance(value, cls):
            return value
        return cls(**_known(cls, value, "butterworth"))


@dataclass(frozen=True)
class CoRaConfig:
    """What to add to a quantized model, and how it is found.

    If you are not sure what to use, set the budget and leave the rest.

    Args:
        budget: What all adapters together may cost, see `Budget`.
        search: How ranks are chosen. `spectral` spends the budget where it removes most
            of the loss; `uniform` gives every layer the same fraction of its full rank;
            `butterworth` learns the ranks by gradient, as CoRa's paper has it.
        metric: Metric of the closed form: `svd` (none), `lqer` (diag E|u|²),
            `qera-approx` (diag E[u²]), `qera-exact` (E[u uᵀ]).
        adapter_bits: Bit width that adapters are stored in: 2 to 8, or 32 for float.
        ranks: Ranks pinned by hand, a layer name or glob each; 0 leaves a layer alone.
        damping: Added to each metric's diagonal, relative to its mean.
        held_out: Share of the calibration images that judge each step and train none.
        sensitivity_images: Images of the backward pass of `spectral`.
        positions: Output positions an image that statistics keep at most a layer, and
            never more than the length of its unfolded input; 0 keeps all.
        max_metric: Largest k of a whole `E[u uᵀ]`; layers above it use diagonal blocks
            of whole input channels.
        seed: Seeds the choice of images, positions and sampled labels.
        butterworth: Settings of the search of that name.
    """

    budget: Budget = field(default_factory=lambda: Budget(0.05))
    search: str = "spectral"
    metric: str = "qera-exact"
    adapter_bits: int = 8
    ranks: Mapping[str, int] = field(default_factory=dict)
    damping: float = 1e-4
    held_out: float = 0.2
    sensitivity_images: int = 64
    positions: int = 64
    max_metric: int = 4608
    seed: int = 0
    butterworth: ButterworthConfig = field(default_factory=ButterworthConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        learning = ButterworthConfig.of(self.butterworth)
        object.__setattr__(self, "butterworth", learning)
        object.__setattr__(self, "ranks", dict(_mapping("ranks", self.ranks)))
        _choice("search", self.search, SEARCHES)
        _choice("metric", self.metric, METRICS)
        whole = ("adapter_bits", "sensitivity_images", "positions", "max_metric")
        for name in (*whole, "seed"):
            _whole(name, getattr(self, name))
        for name, rank in self.ranks.items():
            _whole(f"ranks[{name}]", rank)
            _check(rank >= 0, f"ranks[{name}]", rank, "0 or more")
        bits = self.adapter_bits
        _check(
            bits in (*range(2, 9), 32), "adapter_bits", bits, "2 to 8, or 32 for float"
        )
        for name in ("damping", "held_out"):
            _number(name, getattr(self, name))
        _check(0 <= self.damping < 1, "damping", self.damping, "from 0 to below 1")
        _check(
            0 < self.held_out < 1,
            "held_out",
            self.held_out,
            "between 0 and 1, both excluded (0.2 keeps a fifth of the images)",
        )
        images = self.sensitivity_images
        _check(images >= 1, "sensitivity_images", images, "1 or more")
        _check(self.positions >= 0, "positions", self.positions, "0 (all) or more")
        _check(self.max_metric >= 1, "max_metric", self.max_metric, "1 or more")
        _check(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to below 2^63")

    @property
    def sampled_images(self) -> int:
        """How many calibration images the search runs again, at most."""
        wanted = {
            "spectral": self.sensitivity_images,
            "butterworth": self.butterworth.images,
        }
        return wanted.get(self.search, 0)

    @classmethod
    def of(cls, value: Any = None) -> "CoRaConfig":
        """Read a config from any of its forms.

        Args:
            value: None or True (defaults), a `CoRaConfig`, a mapping, a number (the
                budget), the path of a YAML file, or flag text such as
                `"budget=0.05,search=spectral"`.

        Raises:
            CoRaError: A key is unknown or a value impossible.
        """
        if isinstance(value, cls):
            return value
        if value is None or value is True:
            return cls()
        if isinstance(value, Mapping):
            return cls._from_mapping(value)
        if isinstance(value, Budget | int | float) and value is not False:
            return cls(budget=Budget.parse(value))
        if isinstance(value, os.PathLike):
            return cls.from_yaml(value)
        if isinstance(value, str):
            if value.endswith((".yaml", ".yml")):
                return cls.from_yaml(value)
            return cls.from_text(value)
        raise CoRaError(
            f"cora: {value!r} is not a configuration; pass a mapping, a budget, flag "
            "text such as 'budget=0.05,search=spectral' or the path of a YAML file"
        )

    @classmethod
    def from_text(cls, text: str) -> "CoRaConfig":
        """Read `"budget=0.05 params,search=spectral"`; a lone amount is the budget.

        A dot leads into a mapping: `"butterworth.iterations=40"`.
        """
        values: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, equals, raw = part.partition("=")
            if not equals:
                key, raw = "budget", part
            key, dot, inner = (piece.strip() for piece in key.partition("."))
            into = values.setdefault(key, {}) if dot else values
            name = inner if dot else key
            if not isinstance(into, dict) or name in into:
                given = f"{key}.{inner}" if dot else key
                raise CoRaError(f"{given}: given twice in {text!r}")
            into[name] = _scalar(raw.strip())
        return cls._from_mapping(values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "CoRaConfig":
        """Read a YAML file with the fields at its top."""
        try:
            content = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CoRaError(f"{path}: cannot be read as YAML: {error}") from error
        return cls._from_mapping({} if content is None else content, str(path))

    @classmethod
    def _from_mapping(cls, values: Any, where: str = "cora") -> "CoRaConfig":
        return cls(**_known(cls, values, where))

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `of` reads back."""
        return asdict(self) | {"budget": str(self.budget)}


def _scalar(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise CoRaError(f"{name}: {value!r} is not a mapping of names to values")
    return value


def _known(kind: type[Any], values: Any, where: str) -> Mapping[str, Any]:
    """The mapping, if all its keys are fields of a configuration."""
    known = [f.name for f in fields(kind)]
    for key in _mapping(where, values):
        if key not in known:
            raise CoRaError(
                f"{where}: unknown key {key!r}; the keys are {', '.join(known)}"
            )
    return values  # type: ignore[no-any-return]


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CoRaError(
            f"{name}: {value!r} is unknown; use one of {', '.join(allowed)}"
        )


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CoRaError(f"{name}: {value!r} is not a whole number")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CoRaError(f"{name}: {value!r} is not a number")


def _check(holds: bool, name: str, value: Any, allowed: str) -> None:
    if not holds:
        raise CoRaError(f"{name}: {value} is out of range; use {allowed}")
