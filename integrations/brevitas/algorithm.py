"""CoRa in Brevitas' own idioms: a helper, a mode, a graph transform; adapter files."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from itertools import chain
from types import TracebackType
from typing import Any

import torch
from brevitas.graph.base import GraphTransform
from torch import nn

from cora_plugin import series
from cora_plugin.adapters import load_adapters, save_adapters
from cora_plugin.adapters.errors import ModelError
from cora_plugin.algorithm import CoRa, Run, ordinary_tensors
from cora_plugin.config import AnyConfig, CoRaConfig
from cora_plugin.integrations.brevitas import layers
from cora_plugin.integrations.brevitas.host import BrevitasHost
from cora_plugin.integrations.brevitas.insert import (
    check_provenance,
    insert_correction,
    note_config,
    read_config,
    read_correction,
    remove_correction,
)
from cora_plugin.integrations.brevitas.integer_biases import (
    has_integer_biases,
    watched_biases,
)
from cora_plugin.integrations.brevitas.layers import Reference
from cora_plugin.integrations.brevitas.order import refuse_bias_corrected
from cora_plugin.integrations.brevitas.private import (
    QuantWeightBiasInputOutputLayer,
    keeping_inputs,
    lacks_input,
)
from cora_plugin.integrations.host import refuse_without_adapters
from cora_plugin.integrations.parallel import bare, by_own_names
from cora_plugin.integrations.restored import restored
from cora_plugin.integrations.scopes import evaluation, replaced
from cora_plugin.items import Reader, arguments, check_loader
from cora_plugin.layer import Correction
from cora_plugin.outputs import run
from cora_plugin.processes import agreeing
from cora_plugin.report import Report
from cora_plugin.series import SeriesReport
from cora_plugin.teacher import teaching
from cora_plugin.width_plan import WidthPlan
from cora_plugin.widths import plan_widths

log = logging.getLogger(__name__)


def apply_cora(
    calib_loader: Iterable[Any],
    model: nn.Module,
    config: AnyConfig = None,
    reference: Reference | None = None,
    plan: WidthPlan | None = None,
    unpack: Callable[[Any], Any] | None = None,
    metric_fn: Callable[[Any], float] | None = None,
    teacher: nn.Module | None = None,
    pinned: Mapping[str, int] | None = None,
) -> Report:
    """Give a quantized, calibrated model residual adapters, in place.

    The same shape as Brevitas' `apply_gptq(calib_loader, model)`. It belongs after
    calibration and after GPTQ, GPFQ, Qronos or learned rounding, and before
    `apply_bias_correction`.

    With a `menu` in the config, bit widths are chosen with the adapters, and the
    weights are quantized anew at these; they must have been rounded plainly (for GPTQ
    and the like at planned widths see `plan_bits`), and the data is walked twice.

    Args:
        calib_loader: Yields images [N, …], `(images, targets)`, the model's arguments
            in a tuple or its keywords in a mapping, alone or first in a tuple.
        model: The model, changed in place; if anything fails, it is left unchanged.
        config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
        reference: The float weights that were quantized, where the model has lost them:
            `snapshot(model)` taken right after `quantize_model`, or the float model.
        plan: What `plan_bits` chose, for a model that was quantized at its widths.
        unpack: From what the loader yields to the model's arguments, a tensor, a tuple
            or a mapping, where that is not clear; the report says how it was read.
        metric_fn: Measures the model, higher where it is better, such as top-1 on
            labels: a step that lowers it is undone, whatever it does to the distance.
        teacher: A float model of the same inputs and outputs, which the model is to be
            near to in place of its own float weights: what training with quantization
            began with, or a better one. `refine` trains adapters to its outputs.
        pinned: The bit widths of some layers, by name or glob, which a menu leaves.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    config = CoRaConfig.of(config)
    planning = bool(config.widths) and plan is None
    check_loader(calib_loader, model, walks=2 if planning else 1)
    metric = None if metric_fn is None else partial(metric_fn, model)
    model = bare(model)
    taught = teaching(teacher, model, layers.unpack)
    with restored(model), agreeing(), taught as teach:
        if planning:
            batches = _seen(model, calib_loader, unpack)
            host = _host(model, reference)
            plan = plan_widths(host, batches, config, pinned, None, unpack, keep=True)
            host.widen(plan.layer_bits)
        batches = _seen(model, calib_loader, unpack)
        host = _host(model, reference)
        report = CoRa(config).apply(host, batches, plan, unpack, metric, teach)
        note_config(model, report.config)
    return report


def plan_bits(
    calib_loader: Iterable[Any],
    model: nn.Module,
    config: AnyConfig = None,
    reference: Reference | None = None,
    pinned: Mapping[str, int] | None = None,
    unpack: Callable[[Any], Any] | None = None,
) -> WidthPlan:
    """Choose bit widths and adapters together; the model stays unchanged.

    >>> plan = plan_bits(loader, model, {"budget": "1.0 ptq", "menu": [3, 4, 5, 6, 8]})
    >>> model = quantize_ptq(net, loader, layer_bits=plan.layer_bits)
    >>> apply_cora(loader, model, {"budget": "1.0 ptq"}, plan=plan)

    Args:
        calib_loader: As for `apply_cora`.
        model: The quantized, calibrated model, its weights rounded plainly: GPTQ and
            the like come after, at the widths chosen.
        config: As for `apply_cora`, with a total budget and a menu of widths.
        reference: As for `apply_cora`.
        pinned: The bit widths of some layers, by name or glob, which are not chosen.
        unpack: As for `apply_cora`.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    model = bare(model)
    calib_loader = _seen(model, calib_loader, unpack)
    host = _host(model, reference)
    return plan_widths(host, calib_loader, config, pinned, unpack=unpack)


def expand_weights(
    model: nn.Module, config: AnyConfig = None, reference: Reference | None = None
) -> SeriesReport:
    """Give every layer low-bit terms of its own shape, in place and without data.

    >>> expand_weights(model, "search=series,terms=2,adapter_bits=4")

    Args:
        model: As for `apply_cora`; if anything fails, it is left unchanged.
        config: As for `apply_cora`: `terms` of `adapter_bits` bits, and `ranks` of 0.
        reference: As for `apply_cora`.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    model = bare(model)
    with restored(model):
        report = series.expand_weights(_host(model, reference), config)
        note_config(model, report.config)
    return report


class _Begun(Iterable[Any]):
    """A loader whose first item was taken, which can be walked once."""

    def __init__(self, loader: Iterable[Any], first: Any, rest: Iterator[Any]) -> None:
        self._loader, self._items = loader, chain([first], rest)

    def __iter__(self) -> Iterator[Any]:
        return self._items

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def _seen(
    model: nn.Module, loader: Iterable[Any], unpack: Callable[[Any], Any] | None
) -> Iterable[Any]:
    """Run a first batch, where something is to be seen in it.

    Weight quantizers that go by their layer's input see it, and biases that exports
    will refuse are told of, before all the work.

    Returns:
        The loader, with what was taken from it.
    """
    asking = [
        layer
        for layer in model.modules()
        if isinstance(layer, QuantWeightBiasInputOutputLayer) and lacks_input(layer)
    ]
    if not asking and not has_integer_biases(model):
        return loader
    items = iter(loader)
    first = next(items, None)
    if first is None:
        return ()
    call = partial(run, model, unpack=layers.unpack)
    with torch.no_grad(), evaluation(model), keeping_inputs(asking):
        batch = Reader(call, unpack)(first)
        with watched_biases(model, _warn):
            call(batch)
    return _Begun(loader, first, items)


def _warn(problem: str) -> None:
    log.warning("%s; QCDQ exports will refuse the model as it is", problem)


def _host(model: nn.Module, reference: Reference | None) -> BrevitasHost:
    refuse_bias_corrected(model)
    return BrevitasHost(model, reference)


class cora_mode:  # noqa: N801, as gptq_mode
    """Context manager in the manner of `gptq_mode`.

    >>> with torch.no_grad(), cora_mode(model, "budget=0.05") as cora:
    ...     for images, _ in calib_loader:
    ...         cora.model(images)
    >>> print(cora.report)

    Within it a call of the model, with any arguments, adds a batch to the statistics
    and returns None; on leaving, the adapters are inserted. If the block fails, the
    model is left unchanged.

    Args:
        model: The quantized, calibrated model.
        config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
        reference: As for `apply_cora`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: AnyConfig = None,
        reference: Reference | None = None,
    ) -> None:
        self.model = bare(model)
        self.report: Report | None = None
        self._algorithm = CoRa(config)
        self._host = _host(self.model, reference)
        self._stack = ExitStack()
        self._run: Run | None = None
        self._restored = restored(model)

    def __enter__(self) -> "cora_mode":
        """Begin to collect."""
        self._restored.__enter__()
        try:
            self._begin()
        except BaseException as error:
            self._restored.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _begin(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(ordinary_tensors())
            stack.enter_context(self._host.prepared())
            run = self._run = self._algorithm.start(self._host)
            forward = self.model.forward

            def collect(*args: Any, **keywords: Any) -> None:
                with replaced(self.model, "forward", forward):
                    run.add(arguments(forward, args, keywords, run.items))

            stack.enter_context(replaced(self.model, "forward", collect))
            self._stack = stack.pop_all()
            self._forward = forward

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Insert the adapters, unless the block failed."""
        try:
            with self._stack:
                if error is None and self._run is not None:
                    with replaced(self.model, "forward", self._forward):
                        self.report = self._run.finish()
                        note_config(self.model, self.report.config)
        except BaseException as failed:
            self._restored.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._restored.__exit__(error_type, error, trace)


def remove_cora(model: nn.Module) -> nn.Module:
    """Take every adapter out of a model, in place."""
    inner = bare(model)
    with restored(inner):
        remove_correction(inner)
    return model


def save_cora(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write a model's adapters, and what corrects its biases, to a safetensors file.

    Raises:
        ModelError: The model carries none, or main weights that were alternated.
        OSError: The file cannot be written; no partial file is left.
    """
    model = bare(model)
    correction = read_correction(model)
    refuse_without_adapters(correction.adapters)
    if correction.weights:
        raise ModelError(
            f"{next(iter(correction.weights))}: alternation has quantized its weight "
            "anew, which a file of adapters does not hold; save the model's state_dict"
        )
    notes = {"brevitas": version("brevitas"), "config": read_config(model)}
    save_adapters(path, correction.adapters, correction.shifts, notes)


def load_cora(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put saved adapters into a freshly quantized model of the same recipe, in place.

    Bit widths and quantized weights must be those that the adapters were made for, up
    to one integer in a thousand and the last bits of scales. Activations and biases may
    differ. If anything fails, the model is left unchanged.

    Raises:
        FileError: The file holds no adapters, or was made for other weights.
        ModelError: The model lacks a layer, or has it in another shape.
    """
    adapters, shifts, notes = load_adapters(path)
    inner = bare(model)
    names = {name for name, _ in inner.named_modules()}
    adapters, shifts = by_own_names(adapters, names), by_own_names(shifts, names)
    with restored(inner), torch.random.fork_rng(devices=[]):
        check_provenance(inner, adapters)
        insert_correction(inner, Correction(adapters, shifts))
        note_config(inner, notes.get("config"))
    return model


class CoRaTransform(GraphTransform):
    """CoRa as a `GraphTransform`: `model = CoRaTransform(loader).apply(model)`.

    Args:
        calib_loader: As for `apply_cora`.
        config: As for `apply_cora`.
        reference: As for `apply_cora`.
    """

    def __init__(
        self,
        calib_loader: Iterable[Any],
        config: AnyConfig = None,
        reference: Reference | None = None,
    ) -> None:
        super().__init__()
        self.config = CoRaConfig.of(config)
        self.report: Report | None = None
        self._loader = calib_loader
        self._reference = reference

    def apply(self, model: nn.Module) -> nn.Module:
        """Change the model in place and return it; `report` tells what was done."""
        self.report = apply_cora(self._loader, model, self.config, self._reference)
        return model
