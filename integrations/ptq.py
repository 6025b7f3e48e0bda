"""A toolkit's PTQ of a model, in the same words for every host."""

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from cora_plugin.report import Report


def host_package(name: str) -> ModuleType:
    """Import a host's package, by its entry point; its `PTQ` is an `AbstractPTQ`.

    Raises:
        ModuleNotFoundError: The toolkit is not installed.
    """
    (point,) = entry_points(group="cora_plugin.hosts", name=name)
    package: ModuleType = point.load()
    return package


class AbstractPTQ(ABC):
    """What the demo, recipes and benchmarks ask of a host.

    Args:
        net: The float model, untouched.
        loader: Calibration batches, `(images, targets)`.
        **options: Those of `hints` that are not left at their defaults.
    """

    title: ClassVar[str]
    hints: ClassVar[Mapping[str, Any]]
    """The options and their types; `bias_correction` is one of them."""
    onnx_exporter: ClassVar[str]
    """The host package's function that writes what onnxruntime runs."""

    def __init__(self, net: nn.Module, loader: Any, **options: Any) -> None:
        self.net = net
        self.loader = loader
        self.options = options

    @classmethod
    def first_use(cls) -> Sequence[tuple[str, Callable[[], None]]]:
        """What takes minutes once on a machine and is yet to be done: notice and work.

        `quantize` does it too, where nobody has.
        """
        return ()

    @abstractmethod
    def quantize(self) -> nn.Module:
        """The model as adapters need it: before biases are corrected."""

    @abstractmethod
    def corrected(self, model: nn.Module) -> nn.Module:
        """What `quantize` made, but with corrected biases; `model` stays as it is."""

    @abstractmethod
    def adapt(self, model: nn.Module, config: Any) -> Report:
        """Add adapters in place, and what comes after them.

        Args:
            model: What `quantize` made, or a copy.
            config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
        """

    @staticmethod
    @abstractmethod
    def logits(model: nn.Module, images: Tensor) -> Tensor:
        """Outputs [N, classes, …] of a quantized model, with adapters or without."""


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters with defaults and their types; adapters are named elsewhere."""
    hints = typing.get_type_hints(function)
    return {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name != "cora"
    }
