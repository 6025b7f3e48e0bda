"""One interface to every toolkit, and how the toolkits are found.

The demo, recipes, `cora_plugin.compare` and the benchmarks know no more of a toolkit
than its `Toolkit`. It stands behind an entry point of the group `cora_plugin.hosts`, so
that a host of another package is found like those of this one. Toolkits are imported by
`load_toolkit` alone, for each takes seconds and may be absent.
"""

import copy
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, TypeVar

from rich.console import Console
from torch import Tensor, nn

from cora_plugin.adapters.errors import BudgetError, CoRaError
from cora_plugin.config import CoRaConfig
from cora_plugin.config.declared import Bounds
from cora_plugin.host import Host, TrainableHost
from cora_plugin.integrations.points import entry_point
from cora_plugin.integrations.points import install_line as install_line
from cora_plugin.integrations.points import toolkits as toolkits
from cora_plugin.progress import timed
from cora_plugin.report import Report
from cora_plugin.typed import check
from cora_plugin.width_plan import WidthPlan
from cora_plugin.widths import plan_widths

ADAPTERS = "adapters"
"""The format of the adapters alone, which every toolkit's `exports` should have."""

PACKED = (4, 8)
"""The bit widths that ONNX and OpenVINO IR hold weights at."""

BITS: Mapping[str, int] = {"least": 2, "greatest": 8}
"""The bounds of bit widths."""


def option(default: Any, text: str, **bounds: Any) -> Any:
    """A field of an options dataclass.

    Args:
        default: Its default.
        text: What it is, in a few words.
        **bounds: As `cora_plugin.config.declared.Bounds` has them.
    """
    limits = Bounds(**bounds) if bounds else None
    return field(default=default, metadata={"help": text, "bounds": limits})


class Bounded:
    """A base of options dataclasses, whose constructor checks types and bounds.

    Raises:
        ConfigError: From the constructor: a value is of another type, or a number out
            of its bounds.
    """

    def __post_init__(self) -> None:
        """Check every value; a subclass that has its own checks calls this first."""
        hints = declared(type(self))
        for each in fields(self):  # type: ignore[arg-type]
            check(getattr(self, each.name), hints[each.name], (each.name,))
            bounds: Bounds | None = each.metadata.get("bounds")
            if bounds is not None:
                bounds.check((each.name,), getattr(self, each.name))


@dataclass(frozen=True, kw_only=True)
class Options(Bounded):
    """Options of PTQ that every toolkit has; subclasses add a toolkit's own."""

    weight_bits: int = option(4, "bit width of weights", **BITS)
    act_bits: int = option(8, "bit width of activations", **BITS)
    depthwise_bits: int | None = option(
        None,
        "bit width of depthwise convolutions' weights; null: as the others",
        **BITS,
    )
    layer_bits: Mapping[str, int] | None = option(
        None, "weight bit widths by layer name or glob, over all others", **BITS
    )
    bias_correction: bool | None = option(
        None, "correct biases; null: behind adapters only, if the toolkit does so"
    )


@dataclass(frozen=True, kw_only=True)
class NamedOptions(Bounded):
    """Options of formats whose inputs and outputs have names."""

    input_names: tuple[str, ...] | None = option(
        None, "names of the inputs in their order; null: input, or the arguments' own"
    )
    output_names: tuple[str, ...] | None = option(
        None, "names of the outputs in their order; null: output, or their own"
    )


@dataclass(frozen=True)
class NoOptions:
    """The options of a format that has none."""


def declared(options: type[Any]) -> dict[str, Any]:
    """The names and types of the fields of an options dataclass."""
    hints = typing.get_type_hints(options)
    return {each.name: hints[each.name] for each in fields(options)}


@dataclass(frozen=True)
class Export:
    """A file format of a toolkit.

    * `write(model, example, path, **options)` writes a quantized model, adapters
      included; the example is an input [N, …];
    * `suffix`: of the file's name;
    * `options`: the dataclass that declares the options of `write`;
    * `onnxruntime`: whether onnxruntime runs the file;
    * `forms`: ways to write it that the benchmarks compare, each a name and the
      arguments of `write`; the file takes any batch size;
    * `packs`: from options to the bit widths that weights are packed at, others at the
      next wider one; none where the file is not for storage, or holds any width.
    """

    write: Callable[..., Any]
    suffix: str
    options: type[Any] = NoOptions
    onnxruntime: bool = False
    forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    packs: Callable[[Mapping[str, Any]], Sequence[int]] = lambda options: ()


def adapters_export(save: Callable[[Any, nn.Module], None]) -> Export:
    """The export of the adapters alone, by a host's `save_cora(path, model)`."""

    def write(model: nn.Module, example: Tensor, path: Any) -> None:
        save(path, model)

    return Export(write, ".safetensors")


O = TypeVar("O", bound=Options)  # noqa: E741, the options of one toolkit


@dataclass(frozen=True)
class Quantized(Generic[O]):
    """A quantized model, and what adding adapters and correcting biases needs.

    Attributes:
        model: The model before its biases are corrected, as adapters need it.
        net: The float network that it was made of, untouched.
        loader: The calibration batches, `(images, targets)`.
        options: How it was quantized.
        reference: The float weights, where the model has lost them.
    """

    model: nn.Module
    net: nn.Module
    loader: Iterable[Any]
    options: O
    reference: Mapping[str, Tensor] | nn.Module | None = None

    @property
    def example(self) -> Tensor:
        """An input [1, …]."""
        images: Tensor = next(iter(self.loader))[0]
        return images[:1]

    def copied(self) -> "Quantized[O]":
        """The same with a copy of the model, which can be changed in place."""
        return replace(self, model=copy.deepcopy(self.model))


class Toolkit(ABC, Generic[O]):
    """A toolkit: quantizes, adds adapters, exports.

    Attributes:
        name: That of its entry point, and of its extra.
        title: What tables call it.
        options: A dataclass of its PTQ's options, a subclass of `Options`.
        exports: Its file formats by name, `adapters` among them.
        recipes: Named ways to quantize: values of `options`, the plain one first.
        corrects_afterwards: Whether bias correction is a step after quantization, so
            that a model with adapters can take it, too. Else it is a part of
            quantization, and `correct_biases` quantizes anew.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options: type[O]
    exports: ClassVar[Mapping[str, Export]]
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]]
    corrects_afterwards: ClassVar[bool]

    def first_use(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Work of minutes that is due once on this machine: each a notice and the work.

        `quantize` does it where it is still due.
        """
        return ()

    def prepare(self, console: Console | None = None) -> None:
        """Do what `first_use` has, so that no quantization's seconds count it.

        Args:
            console: Is told of it.
        """
        for notice, work in self.first_use():
            if console is not None:
                console.print(notice)
            timed(console, "preparing the toolkit", work)

    @abstractmethod
    def quantize(
        self, net: nn.Module, loader: Iterable[Any], options: O
    ) -> Quantized[O]:
        """Quantize a copy of a float network; its biases are not corrected.

        Args:
            net: The float network, untouched.
            loader: Calibration batches, `(images, targets)`.
            options: An instance of the class `options`.
        """

    @abstractmethod
    def correct_biases(self, quantized: Quantized[O]) -> Quantized[O]:
        """The same with corrected biases; the given model stays as it is.

        With `corrects_afterwards` the model may carry adapters, and keeps them.
        """

    @abstractmethod
    def adapt(
        self, quantized: Quantized[O], config: Any, plan: WidthPlan | None = None
    ) -> Report:
        """Add adapters in place, and what comes after them by the options.

        Args:
            quantized: What `quantize` made, or a copy.
            config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
            plan: The adapters that were chosen with the model's bit widths.
        """

    def plainly_rounded(self, options: O) -> O:
        """The options without what rounds weights by more than rounding.

        Bit widths are planned on a model quantized by these.
        """
        return options

    def plan(
        self, quantized: Quantized[O], config: Any, keep: bool = False
    ) -> WidthPlan:
        """Choose bit widths and adapters for the network of a quantized model.

        Args:
            quantized: What `quantize` made of `plainly_rounded` options.
            config: A `CoRaConfig` with a total budget and a menu, or anything that
                `CoRaConfig.of` reads.
            keep: Keep the statistics with the plan (see `plan_widths`).
        """
        host = self.host(quantized.model, quantized.example, quantized.reference)
        pinned = quantized.options.layer_bits
        return plan_widths(host, quantized.loader, config, pinned, keep=keep)

    def adapted(
        self, quantized: Quantized[O], config: Any
    ) -> tuple[Quantized[O], Report]:
        """Adapters, and where the config has a menu, bit widths chosen with them.

        A plan is made of weights that are rounded plainly. Where the options round them
        otherwise, the model at the widths that it has is judged beside the planned one,
        by the same held-out images, and the nearer to float is returned.

        Args:
            quantized: What `quantize` made, or a copy, which may be changed in place.
            config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.

        Returns:
            The model with adapters: the given one, or another at other widths.
        """
        settings = CoRaConfig.of(config)
        if not settings.widths:
            return quantized, self.adapt(quantized, settings)
        plain = self.plainly_rounded(quantized.options)
        start = quantized
        if plain != quantized.options:
            start = self.quantize(quantized.net, quantized.loader, plain)
        plan = self.plan(start, settings, keep=True)
        again = self.quantize_planned(start, plan, quantized.options)
        report = self.adapt(again, settings, plan)
        if start is quantized:
            return again, report
        return self._nearer(quantized, settings, again, report)

    def _nearer(
        self,
        given: Quantized[O],
        settings: CoRaConfig,
        planned: Quantized[O],
        report: Report,
    ) -> tuple[Quantized[O], Report]:
        """The planned model, or the given one with adapters in the same budget."""
        try:
            other = self.adapt(given, replace(settings, menu=None))
        except BudgetError:  # It stores more than the whole budget.
            return planned, report
        pair = f"{report.after} with planned bit widths, {other.after} with its own"
        note = f"rounded as the recipe has it, held-out images end at {pair}"
        if report.after.value <= other.after.value:
            return planned, replace(report, notes=(*report.notes, note))
        return given, replace(other, notes=(*other.notes, f"{note}, which are kept"))

    def quantize_planned(
        self, plain: Quantized[O], plan: WidthPlan, options: O | None = None
    ) -> Quantized[O]:
        """The float network quantized at the bit widths of a plan.

        Args:
            plain: What the plan was made of, which stays as it is.
            plan: The plan.
            options: How to quantize; None: as `plain`.
        """
        options = plain.options if options is None else options
        widths = {**(options.layer_bits or {}), **plan.layer_bits}
        return self.at_widths(
            plain, plan.layer_bits, replace(options, layer_bits=widths)
        )

    def at_widths(
        self, plain: Quantized[O], bits: Mapping[str, int], options: O
    ) -> Quantized[O]:
        """The float network quantized at other bit widths of weights.

        This quantizes it anew. A toolkit that calibrates activations with float weights
        need not: it can change the weights' quantizers in a copy of the plain model.

        Args:
            plain: The same network by `plainly_rounded` options; stays as it is.
            bits: The widths that differ, by layer name.
            options: How to quantize, these widths included.
        """
        return self.quantize(plain.net, plain.loader, options)

    @abstractmethod
    def host(
        self,
        model: nn.Module,
        example: Tensor,
        reference: Mapping[str, Tensor] | nn.Module | None = None,
    ) -> Host:
        """The host of a quantized model.

        Args:
            model: The quantized model.
            example: An input [N, …].
            reference: The float weights, where the model has lost them.
        """

    def trainable(self, model: nn.Module, example: Any = None) -> TrainableHost | None:
        """The host of a model that can be trained, with adapters or without.

        Args:
            model: Any model.
            example: An input; None: only what needs none will work.

        Returns:
            None for a model of another toolkit, or where the host cannot train.
        """
        return None

    @abstractmethod
    def outputs(self, model: nn.Module, images: Tensor) -> Tensor:
        """Outputs [N, classes, …] of a quantized model, with adapters or without."""

    def onnxruntime_format(self) -> tuple[str, Export]:
        """The first of `exports` that onnxruntime runs, and its name.

        Raises:
            CoRaError: There is none.
        """
        for name, export in self.exports.items():
            if export.onnxruntime:
                return name, export
        raise CoRaError(
            f"{self.title}: onnxruntime runs none of its formats, "
            f"{', '.join(self.exports)}; choose another toolkit"
        )


def load_toolkit(name: str) -> Toolkit[Any]:
    """Import a host by the name of its entry point.

    Raises:
        ConfigError: There is no such host.
        ModuleNotFoundError: Its toolkit is not installed; the message says how to
            install it.
    """
    point = entry_point(name)
    try:
        toolkit: Toolkit[Any] = point.load()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs the package {error.name}, which is not installed; "
            f"{install_line(name)}",
            name=error.name,
        ) from error
    return toolkit
