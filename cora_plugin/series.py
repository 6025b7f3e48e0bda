"""Low-bit series terms beside every layer, without any data (FP=xINT)."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cora_plugin.adapters import Form
from cora_plugin.adapters.factors import series
from cora_plugin.adapters.files import whole_file
from cora_plugin.algorithm import checked_layers, ordinary_tensors
from cora_plugin.budget import stored_bits
from cora_plugin.config import AnyConfig, CoRaConfig
from cora_plugin.host import Host
from cora_plugin.layer import Correction, by_layer
from cora_plugin.strict import strict_json


@dataclass(frozen=True)
class SeriesReport:
    """What was put beside the layers; how near the model now is takes data to say.

    * `config`: the settings, as `CoRaConfig.to_dict`;
    * `terms` of `bits` bits each;
    * `errors`: ‖W − what stands for it‖ / ‖W‖ before and after, by layer name;
    * `skipped`: layers that cannot carry an adapter, with the reason;
    * `equivalent_bits_before`, `equivalent_bits`: all stored bits over the number of
      quantized weights.
    """

    config: Mapping[str, Any]
    terms: int
    bits: int
    errors: Mapping[str, tuple[float, float]]
    skipped: Mapping[str, str]
    equivalent_bits_before: float
    equivalent_bits: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON, whole or not at all."""
        with whole_file(path) as temporary:
            Path(temporary).write_text(strict_json(self.to_dict()))

    def __str__(self) -> str:
        """A line a layer, and what all of it stores."""
        lines = [f"left alone: {name}: {why}" for name, why in self.skipped.items()]
        lines += [
            f"{name}: relative error {before:.3g} -> {after:.3g}"
            for name, (before, after) in self.errors.items()
        ]
        return "\n".join(
            [
                *lines,
                f"{self.terms} x {self.bits} bits beside each layer: "
                f"{self.equivalent_bits_before:.3f} -> {self.equivalent_bits:.3f} bits "
                "a weight",
            ]
        )


def expand_weights(host: Host, config: AnyConfig = None) -> SeriesReport:
    """Give every layer terms of its own shape; if anything fails, nothing is changed.

    The weight that the toolkit rounded is the first term of the series, and each
    further one is what those before it leave, rounded (FP=xINT, arXiv 2412.06865,
    section 3). With X bits a term's error is at most 1 / (2^X − 1) of the one before.

    Args:
        host: The quantized model inside its toolkit.
        config: A `CoRaConfig` or anything that it reads: `terms`, `adapter_bits`, and
            `ranks` of 0 for layers to leave alone.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    settings = CoRaConfig.of(config)
    if settings.search != "series":
        settings = replace(settings, search="series", regression=False)
    with ordinary_tensors(), host.prepared():
        layers = checked_layers(host)
        names = [layer.name for layer in layers]
        ranks = by_layer("ranks", settings.ranks, names)
        adapters, errors = {}, {}
        for layer in layers:
            if ranks.get(layer.name) == 0:
                continue
            residual, groups = layer.residual, layer.operation.groups
            shape = tuple(residual.shape)
            form = Form.whole(settings.adapter_bits, shape, groups)
            made = series(residual, (form,) * settings.terms)
            adapters[layer.name] = made
            left = residual - made.merged().to(residual)
            size = float(layer.weight.norm()) or 1.0
            before, after = (float(each.norm()) / size for each in (residual, left))
            errors[layer.name] = before, after
        host.correct(Correction(adapters))
    weights = sum(layer.weight.numel() for layer in layers)
    alone = {n: "rank 0 was asked for" for n, r in ranks.items() if r == 0}
    return SeriesReport(
        settings.to_dict(),
        settings.terms,
        settings.adapter_bits,
        errors,
        {**host.skipped, **alone},
        stored_bits(layers, ()) / weights,
        stored_bits(layers, adapters.values()) / weights,
    )
