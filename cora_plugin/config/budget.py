"""How much the adapters of a model may cost, or what they must reach."""

import math
import re
from dataclasses import dataclass
from typing import Any

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.typed import check

COSTS = ("params", "bits", "macs")
TARGETS = ("kl", "bernoulli", "mse", "cosine", "distance", "dB", "agreement")
TOTALS = ("bits total", "ptq", "MiB")
KEY = ("budget",)


@dataclass(frozen=True)
class Budget:
    """How much the adapters of a whole model may cost, or what they must reach.

    Costs: `params` is the fraction of the quantized weights' number, `bits` what the
    adapters add to the equivalent bit width (bits a quantized weight, scales counted),
    `macs` the fraction of the quantized layers' multiply-accumulates.

    Totals count everything that is stored, quantized weights and adapters with their
    scales: `bits total` a weight, `ptq` in multiples of what the quantized weights
    store, or `MiB`.

    Targets: the smallest cost in bits is found that reaches at most this distance to
    the float model, `kl`, `bernoulli`, `mse`, `cosine` or, of any objective,
    `distance`; at least so many `dB` of the float outputs' power over the squared
    error; or at least this share of `agreement` with its decisions. All on the held-out
    images.
    """

    amount: float
    unit: str = "params"

    def __post_init__(self) -> None:
        units = (*COSTS, *TOTALS, *TARGETS)
        if self.unit not in units:
            problem = f"unit {self.unit!r} is unknown; use one of {', '.join(units)}"
            raise ConfigError(KEY, problem)
        check(self.amount, float, KEY)
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise ConfigError(
                KEY,
                f"{self.amount} is not a positive amount; pass for example "
                "'0.05 params' (to use no adapters, leave the plugin off)",
            )
        if self.unit == "agreement" and self.amount > 1:
            raise ConfigError(
                KEY,
                f"an agreement of {self.amount} is more than all; pass a share such as "
                "'0.95 agreement' or '95% agreement'",
            )

    @property
    def is_target(self) -> bool:
        """Whether it says what to reach, not what it may cost."""
        return self.unit in TARGETS

    @property
    def is_total(self) -> bool:
        """Whether it counts the quantized weights, too."""
        return self.unit in TOTALS

    def check_total(self) -> None:
        """Check that bit widths can be planned in it.

        Raises:
            ConfigError: It is no total.
        """
        if not self.is_total:
            raise ConfigError(
                KEY,
                f"{self} is no total; bit widths are planned in a budget of all that "
                "is stored, such as '4.1 bits total', '1.0 ptq' or '0.8 MiB'",
            )

    @classmethod
    def parse(cls, value: Any) -> "Budget":
        """Read `0.05`, `"5%"`, `"0.2 bits"`, `"4.1 bits total"` or `"0.05 kl"`."""
        if isinstance(value, cls):
            return value
        # A space may be missing; no unit begins with the e of an exponent.
        parts = re.sub(r"(?<=[\d.%])(?=[a-df-zM])", " ", str(value)).split()
        try:
            if isinstance(value, bool) or not 1 <= len(parts) <= 3:
                raise ValueError
            number = parts[0]
            percent = number.endswith("%")
            amount = float(number.removesuffix("%")) / (100 if percent else 1)
        except ValueError:
            raise ConfigError(
                KEY,
                f"{value!r} is not an amount with a unit; pass for example "
                "'0.05 params', '0.2 bits' or '0.05 kl'",
            ) from None
        if amount > 1 and parts == [number] and not percent:
            raise ConfigError(
                KEY,
                f"{number} is {amount:.0%} of the weights' number; pass '{number}%', "
                f"or '{100 * amount:g}%' if so much is meant",
            )
        return cls(amount, *([" ".join(parts[1:])] if parts[1:] else []))

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"{float(self.amount)!r} {self.unit}"
