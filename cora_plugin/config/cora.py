"""The settings of CoRa: from keyword arguments, a mapping, YAML or a flag's text."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.config.budget import Budget
from cora_plugin.config.checks import check, choice, known, mapping, number, whole
from cora_plugin.config.learning import ButterworthConfig, FitConfig

METRICS = ("svd", "lqer", "qera-approx", "qera-exact", "rrr")
SEARCHES = ("uniform", "spectral", "butterworth")
CORRECTIONS = ("off", "own", "cascade")


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
            `qera-approx` (diag E[u²]), `qera-exact` (E[u uᵀ]), `rrr` (that first, then
            regression of the whole output error, layer by layer, if it is better).
        adapter_bits: Bit width that adapters are stored in: 2 to 8, or 32 for float.
        ranks: Ranks pinned by hand, a layer name or glob each; 0 leaves a layer alone.
        alternations: How often the main weight is quantized anew as what the adapter
            leaves of it, and the adapter solved again; the best iterate stays.
        bias_correction: `own` restores the mean that a layer's own residual error
            shifts; `cascade` matches the mean output of each layer in the quantized
            network, as far as its signal is still there, front to back; or `off`. The
            regression of `rrr` has its own, which takes the place of these.
        fit: Settings of the refinement by distillation.
        sweep: Further budgets, in the unit of the budget (bits, if that is a target),
            whose outcome the report tells.
        damping: Added to each metric's diagonal, relative to its mean.
        held_out: Share of the calibration images that judge each step and train none.
        sensitivity_images: Images of the backward pass of `spectral`.
        positions: Output positions an image that statistics keep at most a layer, and
            never more than the length of its unfolded input; 0 keeps all.
        sequential_images: Images that are run layer by layer, by `rrr` and `cascade`.
        max_metric: Largest k of a whole `E[u uᵀ]`; layers above it use diagonal blocks
            of whole input channels.
        seed: Seeds the choice of images, positions and sampled labels.
        butterworth: Settings of the search of that name.
    """

    budget: Budget = field(default_factory=lambda: Budget(0.05))
    search: str = "spectral"
    metric: str = "rrr"
    adapter_bits: int = 4
    ranks: Mapping[str, int] = field(default_factory=dict)
    alternations: int = 0
    bias_correction: str = "own"
    fit: FitConfig = field(default_factory=FitConfig)
    sweep: tuple[float, ...] = ()
    damping: float = 1e-4
    held_out: float = 0.2
    sensitivity_images: int = 64
    positions: int = 64
    sequential_images: int = 64
    max_metric: int = 4608
    seed: int = 0
    butterworth: ButterworthConfig = field(default_factory=ButterworthConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget.parse(self.budget))
        learning = ButterworthConfig.of(self.butterworth)
        object.__setattr__(self, "butterworth", learning)
        object.__setattr__(self, "fit", FitConfig.of(self.fit))
        object.__setattr__(self, "sweep", _amounts("sweep", self.sweep))
        object.__setattr__(self, "ranks", dict(mapping("ranks", self.ranks)))
        choice("search", self.search, SEARCHES)
        choice("metric", self.metric, METRICS)
        wanted: Any = self.bias_correction
        if wanted is False:  # as YAML reads a bare `off`
            object.__setattr__(self, "bias_correction", "off")
        choice("bias_correction", self.bias_correction, CORRECTIONS)
        counts = ("sensitivity_images", "sequential_images", "max_metric")
        for name in ("adapter_bits", *counts, "positions", "alternations", "seed"):
            whole(name, getattr(self, name))
        for name, rank in self.ranks.items():
            whole(f"ranks[{name}]", rank)
            check(rank >= 0, f"ranks[{name}]", rank, "0 or more")
        bits = self.adapter_bits
        check(
            bits in (*range(2, 9), 32), "adapter_bits", bits, "2 to 8, or 32 for float"
        )
        for name in ("damping", "held_out"):
            number(name, getattr(self, name))
        check(0 <= self.damping < 1, "damping", self.damping, "from 0 to below 1")
        check(
            0 < self.held_out < 1,
            "held_out",
            self.held_out,
            "between 0 and 1, both excluded (0.2 keeps a fifth of the images)",
        )
        for name in counts:
            check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        check(self.positions >= 0, "positions", self.positions, "0 (all) or more")
        times = self.alternations
        check(times >= 0, "alternations", times, "0 (off) or more")
        if self.search == "butterworth" and (self.sweep or self.budget.is_target):
            what = "sweep" if self.sweep else f"budget {self.budget}"
            raise CoRaError(
                f"{what}: it needs the search again and again, and butterworth learns "
                "for minutes; use search=spectral, or one budget of params, bits or "
                "macs"
            )
        check(0 <= self.seed < 2**63, "seed", self.seed, "from 0 to below 2^63")

    @property
    def sampled_images(self) -> int:
        """How many calibration images are run again, and kept for it, at most."""
        wanted = [0]
        if self.search == "spectral":
            wanted.append(self.sensitivity_images)
        if self.search == "butterworth":
            wanted.append(self.butterworth.images)
        if self.metric == "rrr" or self.bias_correction == "cascade":
            wanted.append(self.sequential_images)
        if self.fit.iterations:
            wanted.append(self.fit.images)
        return max(wanted)

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
        return cls(**known(cls, values, where))

    def to_dict(self) -> dict[str, Any]:
        """A mapping that `of` reads back."""
        return asdict(self) | {
            "budget": str(self.budget),
            "sweep": list(self.sweep),
        }


def _scalar(text: str) -> Any:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _amounts(name: str, value: Any) -> tuple[float, ...]:
    """Amounts from a sequence, or from text such as `0.02/0.05/0.1`."""
    if isinstance(value, str):
        value = [_scalar(part.strip()) for part in value.split("/")]
    if isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list | tuple):
        raise CoRaError(
            f"{name}: {value!r} is not a list of budgets; pass for example "
            "[0.02, 0.05, 0.1], or sweep=0.02/0.05/0.1 in a flag"
        )
    for amount in value:
        number(name, amount)
        check(math.isfinite(amount) and amount > 0, name, amount, "more than 0")
    return tuple(float(amount) for amount in value)
