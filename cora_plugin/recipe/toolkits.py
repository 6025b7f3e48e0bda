"""What a recipe asks of a toolkit; a host is imported when its recipe is read."""

import copy
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cora_plugin.config import CoRaConfig
from cora_plugin.document import unknown
from cora_plugin.recipe.schema import Recipe
from cora_plugin.report import Report

Format = Callable[..., None]

CORRECT = "bias_correction"
"""The option of `ptq` that every toolkit has."""


class Toolkit(ABC):
    """A toolkit's PTQ of one model, with a recipe's options.

    Args:
        net: The float model, untouched.
        loader: Calibration batches, `(images, targets)`.
        options: The recipe's `ptq`.
    """

    title: str

    def __init__(self, net: nn.Module, loader: Any, options: Mapping[str, Any]) -> None:
        self.net = net
        self.loader = loader
        self.options = options

    @staticmethod
    @abstractmethod
    def hints() -> dict[str, Any]:
        """The options of `ptq` and their types."""

    @staticmethod
    @abstractmethod
    def formats() -> dict[str, Format]:
        """What a model can be exported to: `write(model, example, path, **options)`."""

    @abstractmethod
    def quantize(self) -> nn.Module:
        """The model as adapters need it: before biases are corrected."""

    @abstractmethod
    def corrected(self, model: nn.Module) -> nn.Module:
        """The model without adapters and with corrected biases; `model` stays as is."""

    @abstractmethod
    def adapt(self, model: nn.Module, config: CoRaConfig) -> Report:
        """Add adapters in place, and what comes after them."""

    @abstractmethod
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs of a quantized model for one batch."""


class Brevitas(Toolkit):
    """Brevitas' layerwise PTQ, its weight rounding, its bias correction."""

    title = "Brevitas"

    @staticmethod
    def hints() -> dict[str, Any]:
        """Those of `quantize_ptq` and `round_weights`, and `bias_correction`."""
        from cora_plugin.integrations.brevitas.flow import round_weights
        from cora_plugin.integrations.brevitas.recipe import quantize_ptq

        return {
            **_options(quantize_ptq),
            **_options(round_weights),
            CORRECT: bool,
        }

    @staticmethod
    def formats() -> dict[str, Format]:
        """Every exporter of the host, and the adapters alone."""
        from cora_plugin.integrations import brevitas

        return _formats(brevitas)

    def quantize(self) -> nn.Module:
        """PTQ, then GPTQ or the like if it is asked for."""
        from cora_plugin.integrations.brevitas import snapshot
        from cora_plugin.integrations.brevitas.flow import round_weights
        from cora_plugin.integrations.brevitas.recipe import quantize_ptq

        rounding = _options(round_weights)
        options = {k: v for k, v in self.options.items() if k != CORRECT}
        quantizing = {k: v for k, v in options.items() if k not in rounding}
        model = quantize_ptq(self.net, self.loader, **quantizing)
        self._weights = snapshot(model)
        chosen = {k: v for k, v in options.items() if k in rounding}
        round_weights(model, self.loader, **chosen)
        return model

    def corrected(self, model: nn.Module) -> nn.Module:
        """A copy with corrected biases."""
        copied = copy.deepcopy(model)
        self._correct(copied)
        return copied

    def adapt(self, model: nn.Module, config: CoRaConfig) -> Report:
        """Adapters, then bias correction."""
        from cora_plugin.integrations.brevitas import apply_cora

        report = apply_cora(self.loader, model, config, self._weights)
        if self.options.get(CORRECT):
            self._correct(model)
        return report

    def _correct(self, model: nn.Module) -> None:
        from cora_plugin.integrations.brevitas.flow import correct_biases

        correct_biases(model, self.loader)

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs in Brevitas' inference mode."""
        from cora_plugin.integrations.brevitas.recipe import logits

        return logits(model, images)


class NNCF(Toolkit):
    """`nncf.quantize`; with adapters, biases are corrected after them, guarded."""

    title = "NNCF"

    @staticmethod
    def hints() -> dict[str, Any]:
        """Those of `quantize_ptq`."""
        from cora_plugin.integrations.nncf import quantize_ptq

        return _options(quantize_ptq)

    @staticmethod
    def formats() -> dict[str, Format]:
        """Every exporter of the host, and the adapters alone."""
        from cora_plugin.integrations import nncf

        return _formats(nncf)

    def quantize(self) -> nn.Module:
        """PTQ without bias correction, which adapters would have to undo."""
        return self._quantize(**{CORRECT: False})

    def corrected(self, model: nn.Module) -> nn.Module:
        """Quantized anew, for bias correction is a part of `nncf.quantize`."""
        return self._quantize(**{CORRECT: True})

    def _quantize(self, **changes: Any) -> nn.Module:
        from cora_plugin.integrations.nncf import quantize_ptq

        return quantize_ptq(self.net, self.loader, **{**self.options, **changes})

    def adapt(self, model: nn.Module, config: CoRaConfig) -> Report:
        """Adapters, then bias correction where it helps, unless it is refused."""
        from cora_plugin.integrations.nncf import apply_cora

        correct = self.options.get(CORRECT, True)
        return apply_cora(model, self.loader, config, bias_correction=correct)

    @torch.no_grad()
    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs of the model."""
        outputs: Tensor = model(images)
        return outputs


_KINDS: dict[str, type[Toolkit]] = {"brevitas": Brevitas, "nncf": NNCF}


def toolkit(recipe: Recipe) -> type[Toolkit]:
    """The recipe's toolkit, once its options and formats are found to be right.

    Raises:
        CoRaError: An option or a format is unknown, or a value of the wrong type.
        ModuleNotFoundError: The toolkit is not installed.
    """
    kind = _KINDS[recipe.toolkit]
    document = recipe.document
    try:
        hints, formats = kind.hints(), kind.formats()
    except ModuleNotFoundError as error:
        message = (
            f"toolkit: {recipe.toolkit} needs the package {error.name}, which is not "
            f'installed; pip install "cora-plugin[{recipe.toolkit}]"'
        )
        located = document.error(("toolkit",), message)
        raise ModuleNotFoundError(str(located), name=error.name) from error
    document.known(("ptq",), hints)
    for name, value in recipe.ptq.items():
        document.typed(("ptq", name), value, hints[name])
    for index, export in enumerate(recipe.exports):
        key = ("exports", index, "format")
        if export.format not in formats:
            where = f"exports.{index}"
            raise document.error(key, unknown("format", export.format, formats, where))
        allowed = _options(formats[export.format])
        for name, value in export.options.items():
            if name not in allowed:
                where = f"exports.{index}"
                names = ["format", "path", *allowed]
                raise document.error(
                    ("exports", index, name), unknown("key", name, names, where)
                )
            document.typed(("exports", index, name), value, allowed[name])
    return kind


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters with defaults and their types; adapters are named elsewhere."""
    hints = typing.get_type_hints(function)
    return {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name != "cora"
    }


def _formats(host: ModuleType) -> dict[str, Format]:
    """A host's `export_…(model, example, path, …)` by what follows `export_`."""
    formats: dict[str, Format] = {"adapters": _adapters(host)}
    for name in host.__all__:
        if name.startswith("export_"):
            function = getattr(host, name)
            if "path" in " ".join(inspect.signature(function).parameters):
                formats[name.removeprefix("export_")] = function
    return formats


def _adapters(host: ModuleType) -> Format:
    def save(model: nn.Module, example: Tensor, path: str) -> None:
        host.save_cora(path, model)

    return save
