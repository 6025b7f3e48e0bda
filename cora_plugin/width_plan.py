"""A plan of bit widths and adapters, and how it was chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.layer import QuantizedLayer
from cora_plugin.objective import Distance
from cora_plugin.plan import Plan
from cora_plugin.search import Treatment
from cora_plugin.statistics import Collector


@dataclass(frozen=True)
class Trial:
    """A plan that was tried on the held-out images.

    `menu` has the widths it chose from, none for those of the host; with `rounding` it
    counted what rounding adapters costs. `bits` counts all that is stored, a weight;
    `predicted` is the error that the search saw in it. Where it is `regressed`, the
    distance is that behind the regression of its adapters.
    """

    menu: tuple[int, ...]
    adapters: bool
    rounding: bool
    bits: float
    predicted: float
    distance: Distance
    regressed: bool = False


@dataclass(frozen=True)
class WidthPlan:
    """Bit widths for the host to quantize at, and the adapters that go with them.

    * `layer_bits`: widths by layer name, of layers that are not as the host has them;
    * `widths`: of all layers;
    * `treatments`: the adapters by layer name;
    * `bits`: all that is stored, a weight, of the `allowed`;
    * `trials`: what was tried, the chosen one first;
    * `next_tenth`: the share of the predicted error that a budget of 0.1 bits a weight
      more would take away;
    * `curve`: bits a weight and the predicted error of budgets around this one, as the
      chosen trial would spend them;
    * `floats`: fingerprints of the float weights that it is for, by layer name;
    * `collected`: the statistics, where they are to be used again.
    """

    layer_bits: Mapping[str, int]
    widths: Mapping[str, float]
    treatments: Mapping[str, Treatment]
    bits: float
    allowed: float
    trials: tuple[Trial, ...]
    next_tenth: float
    curve: tuple[tuple[float, float], ...]
    floats: Mapping[str, Fingerprint]
    collected: Collector | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; adapters are in the rows of reports."""
        trials = [
            {
                "menu": list(each.menu),
                "adapters": each.adapters,
                "rounding": each.rounding,
                "bits": each.bits,
                "predicted": each.predicted,
                "value": each.distance.value,
                "regressed": each.regressed,
            }
            for each in self.trials
        ]
        return {
            "layer_bits": dict(self.layer_bits),
            "bits": self.bits,
            "allowed": self.allowed,
            "next_tenth": self.next_tenth,
            "curve": [list(point) for point in self.curve],
            "trials": trials,
        }

    def for_layers(self, layers: Sequence[QuantizedLayer]) -> Plan:
        """The adapters, for a model that was quantized at these widths.

        Raises:
            ConfigError: The model has other layers, widths or float weights.
        """
        found = {layer.name: layer.weight_bits for layer in layers}
        for name in {*found, *self.widths}:
            if found.get(name) != self.widths.get(name):
                raise ConfigError(
                    ("plan",),
                    f"{name}: planned at {self.widths.get(name, 'no')} bits, and the "
                    f"model has it at {found.get(name, 'no')}; quantize the float "
                    "model anew with layer_bits=plan.layer_bits, all else as before",
                )
        for layer in layers:
            mine, values = fingerprint(layer), layer.weight.numel()
            difference = self.floats[layer.name].difference(mine, values)
            if difference is not None:
                raise ConfigError(
                    ("plan",),
                    f"{layer.name}: planned for {difference}; the plan is of another "
                    "float model, or of a recipe that changes weights before they are "
                    "quantized in another way: call plan_bits again",
                )
        outputs = dict.fromkeys(self.widths, 1)
        used = sum(
            form.cost(outputs[name]).bits
            for name, each in self.treatments.items()
            for form in each.forms
        )
        bare = {n: Treatment(each.forms) for n, each in self.treatments.items()}
        return Plan(bare, used, used, "bits")


def fingerprint(layer: QuantizedLayer) -> Fingerprint:
    """That of a layer's float weight, in steps of 8 bits."""
    return Fingerprint.of(layer.weight, 8, layer.operation)
