"""CoRa in NNCF's own idioms: a pipeline step, a direct call; adapter files."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import nncf
import torch
from nncf.common.graph.graph import NNCFGraph
from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
from torch import nn

from cora_plugin import series
from cora_plugin.adapters import load_adapters, save_adapters
from cora_plugin.adapters.errors import ConfigError, DataError
from cora_plugin.algorithm import CoRa
from cora_plugin.config import AnyConfig, CoRaConfig
from cora_plugin.integrations.host import refuse_without_adapters
from cora_plugin.integrations.nncf.dataset import ImageDataset
from cora_plugin.integrations.nncf.extension import load_extension
from cora_plugin.integrations.nncf.host import NNCFHost
from cora_plugin.integrations.nncf.insert import (
    insert_hooks,
    read_adapters,
    remove_hooks,
    shifts,
)
from cora_plugin.integrations.nncf.layers import Reference, check_model
from cora_plugin.integrations.nncf.step import TorchStep
from cora_plugin.integrations.parallel import bare, by_own_names
from cora_plugin.integrations.provenance import check_made_for
from cora_plugin.integrations.restored import restored
from cora_plugin.integrations.scopes import evaluation
from cora_plugin.items import Reader, check_loader
from cora_plugin.outputs import device_of, run
from cora_plugin.processes import agreeing
from cora_plugin.report import Report
from cora_plugin.series import SeriesReport
from cora_plugin.teacher import teaching
from cora_plugin.width_plan import WidthPlan
from cora_plugin.widths import plan_widths

log = logging.getLogger(__name__)


def apply_cora(
    model: nn.Module,
    dataset: nncf.Dataset | Iterable[Any],
    config: AnyConfig = None,
    reference: Reference | None = None,
    subset_size: int | None = None,
    bias_correction: bool = True,
    plan: WidthPlan | None = None,
    pinned: Mapping[str, int] | None = None,
    unpack: Callable[[Any], Any] | None = None,
    metric_fn: Callable[[Any], float] | None = None,
    teacher: nn.Module | None = None,
) -> Report:
    """Give a model that NNCF quantized residual adapters, in place.

    With a `menu` in the config, bit widths are chosen with them, and the model's
    weights are quantized anew at these; the data is then walked twice.

    Args:
        model: What `nncf.quantize` returned, changed in place; if anything fails, it is
            left unchanged.
        dataset: An `nncf.Dataset`, whose items are the model's arguments, or an
            iterable of images [N, …], `(images, targets)`, arguments in a tuple or
            keywords in a mapping; walked once.
        config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
        reference: The float model, needed only where NNCF corrected biases (as it does
            by default) or training moved the weights; NNCF keeps float weights itself.
        subset_size: Number of batches that are used at most; None is all.
        bias_correction: Whether to correct biases after the adapters, as the config's
            `bias_correction` says. It is taken back unless it lowers the divergence on
            held-out images.
        plan: What `plan_bits` chose, for a model that was quantized at its widths.
        pinned: The bit widths of some layers, by name or glob, which a menu leaves.
        unpack: From an item of the iterable to the model's arguments, a tensor, a tuple
            or a mapping, where that is not clear; the report says how it was read.
        metric_fn: Measures the model, higher where it is better, such as top-1 on
            labels: a step that lowers it is undone, whatever it does to the distance.
        teacher: A float model of the same inputs and outputs, which the model is to be
            near to in place of its own float weights: what training with quantization
            began with, or a better one. `refine` trains adapters to its outputs.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    config = CoRaConfig.of(config)
    if not bias_correction:
        config = replace(config, bias_correction="off")
    planning = bool(config.widths) and plan is None
    metric = None if metric_fn is None else partial(metric_fn, model)
    model = bare(model)
    _check_data(model, dataset, walks=2 if planning else 1)
    check_model(model)
    given = model, dataset, reference, subset_size, unpack
    with restored(model), agreeing(), teaching(teacher, model) as teach:
        host, batches, reader = _hosted(*given)
        if planning:
            plan = plan_widths(host, batches, config, pinned, unpack=reader, keep=True)
            host.widen(plan.layer_bits)
            host, batches, reader = _hosted(*given)
        report = CoRa(config).apply(host, batches, plan, reader, metric, teach)
        vars(model)["cora_config"] = report.config  # for `save_cora`
    return report


def plan_bits(
    model: nn.Module,
    dataset: nncf.Dataset | Iterable[Any],
    config: AnyConfig = None,
    reference: Reference | None = None,
    subset_size: int | None = None,
    pinned: Mapping[str, int] | None = None,
    unpack: Callable[[Any], Any] | None = None,
) -> WidthPlan:
    """Choose bit widths and adapters together; the model stays unchanged.

    >>> plan = plan_bits(model, loader, {"budget": "1.0 ptq", "menu": [3, 4, 5, 6, 8]})
    >>> model = quantize_ptq(net, loader, layer_bits=plan.layer_bits)
    >>> apply_cora(model, loader, {"budget": "1.0 ptq"}, plan=plan)

    Args:
        model: What `nncf.quantize` returned.
        dataset: As for `apply_cora`.
        config: As for `apply_cora`, with a total budget and a menu of widths.
        reference: As for `apply_cora`.
        subset_size: As for `apply_cora`.
        pinned: The bit widths of some layers, by name or glob, which are not chosen.
        unpack: As for `apply_cora`.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    given = bare(model), dataset, reference, subset_size, unpack
    host, batches, reader = _hosted(*given)
    return plan_widths(host, batches, config, pinned, unpack=reader)


def expand_weights(
    model: nn.Module,
    example: Any,
    config: AnyConfig = None,
    reference: Reference | None = None,
) -> SeriesReport:
    """Give every layer low-bit terms of its own shape, in place and without data.

    >>> expand_weights(model, torch.ones(1, 3, 224, 224), "search=series,terms=2")

    Args:
        model: As for `apply_cora`; if anything fails, it is left unchanged.
        example: An input that the model can be traced with; its values do not matter.
        config: As for `apply_cora`: `terms` of `adapter_bits` bits, and `ranks` of 0.
        reference: As for `apply_cora`.

    Raises:
        CoRaError: Something that the caller can change is wrong.
    """
    model = bare(model)
    host, *_ = _hosted(model, [example], reference, None, None)
    with restored(model):
        report = series.expand_weights(host, config)
        vars(model)["cora_config"] = report.config  # for `save_cora`
    return report


def _hosted(
    model: nn.Module,
    dataset: nncf.Dataset | Iterable[Any],
    reference: Reference | None,
    subset_size: int | None,
    unpack: Callable[[Any], Any] | None,
) -> tuple[NNCFHost, Iterator[Any], Reader]:
    """The host of a model, the items to calibrate with, and what reads them."""
    if subset_size is not None and subset_size < 1:
        raise ConfigError(
            ("subset_size",), f"{subset_size} uses no data; pass 1 or more"
        )
    check_model(model)
    load_extension(device_of(model))
    batches = islice(iter(_batches(dataset, model)), subset_size)
    first = next(batches, None)
    if first is None:
        raise DataError(
            "calibration data: the dataset is empty; pass a few dozen images"
        )
    if unpack is None and isinstance(dataset, nncf.Dataset):
        unpack = _as_they_are
    reader = Reader(partial(run, model), unpack)
    with evaluation(model):
        example = reader(first)
    return NNCFHost(model, example, reference), chain([first], batches), reader


def _check_data(model: Any, dataset: Any, walks: int) -> None:
    """Refuse what is neither an NNCF dataset nor a loader.

    Raises:
        DataError: As `check_loader` has it.
    """
    if not isinstance(dataset, nncf.Dataset):
        check_loader(dataset, model, walks)


def _as_they_are(item: Any) -> Any:
    """An NNCF dataset's items are the arguments of the model."""
    return item


def _batches(dataset: nncf.Dataset | Iterable[Any], model: nn.Module) -> Iterable[Any]:
    if not isinstance(dataset, nncf.Dataset):
        return dataset
    return ImageDataset(dataset, model).get_inference_data()


class CoRaAlgorithm(TorchStep):
    """CoRa as a step of an NNCF pipeline, after the quantizers are placed.

    Args:
        config: A `CoRaConfig` or anything that `CoRaConfig.of` reads.
        subset_size: Number of the dataset's items that are used at most.
        bias_correction: As for `apply_cora`.
        pinned: As for `apply_cora`.
        teacher: As for `apply_cora`.
    """

    def __init__(
        self,
        config: AnyConfig = None,
        subset_size: int | None = None,
        bias_correction: bool = True,
        pinned: Mapping[str, int] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.config = CoRaConfig.of(config)
        self.report: Report | None = None
        self.dataset: nncf.Dataset | None = None
        self._subset_size = subset_size
        self._bias_correction = bias_correction
        self._pinned = pinned
        self._teacher = teacher

    def apply(
        self,
        model: Any,
        graph: NNCFGraph,
        statistic_points: StatisticPointsContainer | None = None,
        dataset: nncf.Dataset | None = None,
    ) -> Any:
        """Change NNCF's wrapped model in place; `report` then has the report.

        The torch model keeps the report as its attribute `cora_report`.

        Raises:
            CoRaError: Something that the caller can change is wrong.
        """
        dataset = dataset or self.dataset
        if dataset is None:
            raise DataError(
                "CoRaAlgorithm: it needs the calibration dataset; call apply(…, "
                "dataset=…), or run it in a CoRaPipeline"
            )
        self.report = apply_cora(
            model.model,
            dataset,
            self.config,
            subset_size=self._subset_size,
            bias_correction=self._bias_correction,
            pinned=self._pinned,
            teacher=self._teacher,
        )
        model.reset_graph()
        model.model.cora_report = self.report
        log.info("%s", self.report)
        return model


def remove_cora(model: nn.Module) -> nn.Module:
    """Take every adapter out of a model, in place."""
    inner = bare(model)
    check_model(inner)
    with restored(inner):
        remove_hooks(inner)
        vars(inner).pop("cora_config", None)
    return model


def save_cora(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write a model's adapters, and what corrects its biases, to a safetensors file.

    Raises:
        ModelError: The model carries none.
        OSError: The file cannot be written; no partial file is left.
    """
    model = bare(model)
    check_model(model)
    adapters = read_adapters(model)
    refuse_without_adapters(adapters)
    corrections = {name: hook.shift for name, hook in shifts(model).items()}
    config = getattr(model, "cora_config", None)
    notes = {"nncf": version("nncf"), "config": config}
    save_adapters(path, adapters, corrections, notes)


def load_cora(
    path: str | os.PathLike[str], model: nn.Module, example_input: Any
) -> nn.Module:
    """Put saved adapters into a freshly quantized model of the same recipe, in place.

    If anything fails, the model is left unchanged.

    Args:
        path: The file.
        model: The quantized model.
        example_input: An input, for NNCF traces the model to find its layers.

    Raises:
        FileError: The file holds no adapters, or was made for other weights.
        ModelError: The model lacks a layer, or has it in another shape.
    """
    adapters, corrections, notes = load_adapters(path)
    inner = bare(model)
    host = NNCFHost(inner, example_input)
    with restored(inner), torch.random.fork_rng(devices=[]):
        reading = host.reading
        adapters = by_own_names(adapters, reading.layers)
        corrections = by_own_names(corrections, reading.layers)
        weights = {
            name: (layer.dequantized, layer.weight_bits, layer.operation)
            for name, layer in reading.layers.items()
        }
        check_made_for(adapters, weights)
        insert_hooks(inner, reading.layers, reading.nodes, adapters, corrections)
        vars(inner)["cora_config"] = notes.get("config")
    return model
