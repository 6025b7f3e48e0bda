"""Runs a recipe: float model, toolkit, adapters, exports, report."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from cora_plugin.adapters.errors import (
    CoRaError,
    DataError,
    FileError,
    Key,
    ToolkitError,
)
from cora_plugin.compare.rows import show
from cora_plugin.integrations.doing import doing, in_a_line
from cora_plugin.integrations.toolkit import ADAPTERS, Export
from cora_plugin.progress import timed
from cora_plugin.qat import QATReport, finetune
from cora_plugin.recipe.folder import in_the_way, opened, written
from cora_plugin.recipe.images import (
    Files,
    Item,
    drawn,
    files,
    make,
    preprocessing,
    transform,
)
from cora_plugin.recipe.models import (
    check_model,
    load_model,
    own_modules,
    plain_layers,
)
from cora_plugin.recipe.outputs import loaded, outputs_of, plainly
from cora_plugin.recipe.packed import as_packed
from cora_plugin.recipe.results import Results
from cora_plugin.recipe.schema import IMAGES, Recipe
from cora_plugin.recipe.toolkits import Chosen, chosen


@dataclass(frozen=True)
class _Plan:
    """What `check` found: the toolkit, and the files that images are in."""

    chosen: Chosen
    data: Files | None
    test: Files | None


def check(recipe: Recipe) -> None:
    """Find out whether a recipe could run, and leave nothing behind.

    Names, options, files, packages and the output folder are looked at; the model is
    not loaded and factories are not called.

    Raises:
        CoRaError: Something in the recipe is wrong; the message says its line.
        ModuleNotFoundError: A package is not installed.
    """
    with own_modules():
        plan = _plan(recipe)
    with opened(recipe.document, Path(recipe.output), keep=False):
        _check_folder(recipe, plan)


def check_names(recipe: Recipe) -> Chosen:
    """Find out whether toolkit, options, formats and model are known.

    Raises:
        CoRaError: One is not; the message says its line.
        ModuleNotFoundError: A package is not installed.
    """
    with own_modules():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = chosen(recipe)
        check_model(recipe)
    return found


def run(recipe: Recipe, console: Console | None = None) -> Results:
    """Do what a recipe says; print a table, fill its output folder.

    The folder is changed at the end, and then holds this run's files in place of those
    of an earlier one. An export that fails does not take the others with it: it is in
    `failures` of the results, and in the report.

    Args:
        recipe: The recipe.
        console: Where progress and the table go.

    Raises:
        CoRaError: Something in the recipe is wrong; the message says its line.
        ModuleNotFoundError: A package is not installed.
        OSError: The output folder cannot be written to.
    """
    console = console or Console(file=sys.stdout)  # Toolkits print elsewhere.
    with (
        own_modules(),
        opened(recipe.document, Path(recipe.output)) as folder,
    ):
        plan = _plan(recipe)
        _check_folder(recipe, plan)
        toolkit, options = plan.chosen.toolkit, plan.chosen.options
        net = load_model(recipe)
        recipe, data, test = _images(recipe, plan, net)
        note = None
        if recipe.cora is not None:
            cora, note = as_packed(recipe.cora, plan.chosen)
            recipe = replace(recipe, cora=cora)
        batches = loaded(data, recipe.data.batch_size, console)
        net = plain_layers(net, batches.dataset[:1][0]).to(recipe.device)
        results = Results(recipe, toolkit.title)
        results.notes += [note] if note else []
        judged = partial(outputs_of, images=test, console=console)
        reference, labels = judged(plainly, net, what="float model")
        results.begin(reference, labels, test)

        what = f"{toolkit.title} PTQ"
        stage = partial(_stage, recipe, toolkit.title)
        with stage("quantizing"):
            toolkit.prepare(console)
            quantize = toolkit.quantize
            base, seconds = timed(console, what, quantize, net, batches, options)
        plain = base
        if options.bias_correction:
            with stage("correcting biases"):
                correct = toolkit.correct_biases
                plain, more = timed(console, f"{what}, biases", correct, base)
            seconds += more
        with stage("running the quantized model"):
            outputs, _ = judged(toolkit.outputs, plain.model, what=what)
        results.add(what, outputs, seconds)
        with stage("counting its bits"):
            example = batches.dataset[:1][0]
            # Bits need no float weights, from which Qronos may have moved far.
            results.count(toolkit.host(base.model, example).layers)
        model = plain.model
        if recipe.cora is not None:
            with stage("adding adapters"):
                (adapted, report), more = timed(
                    console, "adapters", toolkit.adapted, base, recipe.cora
                )
            model = adapted.model
            outputs, _ = judged(toolkit.outputs, model, what="with adapters")
            results.add("+ adapters", outputs, more, report)
        if recipe.qat is not None:
            with stage("training"):
                trained, more = timed(
                    console, "training", _trained, recipe, batches, model, net
                )
            outputs, _ = judged(toolkit.outputs, model, what="trained")
            results.add_trained(outputs, more, trained)
        results.float_model, results.model = net, model
        results.example = example
        _export(results, toolkit.exports, model, results.example, folder, console)
        results.write(folder)
    show(results.table(), console)
    for line in results.lines():
        console.print(line, highlight=False, markup=False)
    return results


@contextmanager
def _stage(recipe: Recipe, toolkit: str, what: str) -> Iterator[None]:
    """Say of a toolkit's failure where it was in the run, and in which recipe."""
    try:
        with doing(toolkit, what):
            yield
    except ToolkitError as error:
        located = recipe.document.error(("toolkit",), str(error), ToolkitError)
        raise located from error.__cause__


def _export(
    results: Results,
    formats: Mapping[str, Export],
    model: nn.Module,
    example: Tensor,
    folder: Path,
    console: Console,
) -> None:
    recipe, report = results.recipe, results.report
    for index, export in enumerate(recipe.exports):
        if export.format == ADAPTERS and not (report and report.adapter_parameters):
            # Without a report cora=false is all that a baseline takes.
            if report:
                results.notes.append(
                    f"no {export.path}: no adapter made the network better on the "
                    "held-out images, so none is in it"
                )
            continue
        path = folder / export.path
        path.parent.mkdir(parents=True, exist_ok=True)
        write = partial(formats[export.format].write, **export.options)
        before = set(written(folder))
        try:
            timed(console, f"exporting {export.path}", write, model, example, path)
        # Whatever an exporter may raise at a model that it cannot write.
        except Exception as error:
            for name in set(written(folder)) - before:
                (folder / name).unlink()
            if isinstance(error, CoRaError):  # Those say what they are about.
                why = next(iter(str(error).splitlines()), "")
            else:
                why = f"{export.format} cannot be written: {in_a_line(error)}"
            why = why.replace(f"{folder}{os.sep}", f"{recipe.output}{os.sep}")
            failure = recipe.document.error(("exports", index), why, FileError)
            failure.__cause__ = error
            results.failures.append(failure)


def _trained(
    recipe: Recipe, batches: Any, model: nn.Module, net: nn.Module
) -> QATReport:
    """Train a model in place on the calibration images, and judge it by a fifth."""
    images, labels = batches.dataset.tensors
    held = torch.arange(len(images)) % 5 == 4
    if held.sum() == 0:
        raise recipe.document.error(
            ("qat",),
            f"{len(images)} images leave none to judge the training; raise data.images",
            DataError,
        )
    parts = [TensorDataset(images[chosen], labels[chosen]) for chosen in (~held, held)]
    order = torch.Generator().manual_seed(recipe.data.seed)
    size = recipe.data.batch_size
    training = DataLoader(parts[0], size, shuffle=True, generator=order)
    return finetune(
        model,
        training,
        reference=net,
        held_out=DataLoader(parts[1], size),
        config=recipe.qat,
    )


def _plan(recipe: Recipe) -> _Plan:
    tool = check_names(recipe)
    _check_device(recipe)
    data = files(recipe, "data")
    if data is not None and recipe.model.factory:
        # Other models say themselves how images are made their input.
        if transform(recipe, recipe.data.preprocessing) is None:
            raise _no_preprocessing(recipe)
    own = any(getattr(recipe.test, name) for name in IMAGES)
    test = files(recipe, "test") if own else None
    if data is not None and (test is not None or not own):
        judging = None if test is None else make(recipe, "test", test)
        drawn(recipe, make(recipe, "data", data), judging)  # Are there enough?
    return _Plan(tool, data, test)


def _check_folder(recipe: Recipe, plan: _Plan) -> None:
    """Refuse to work for what could not be put into the output folder.

    Raises:
        ConfigError: Something else is in the place of a file of the run.
    """
    paths = [export.path for export in plan.chosen.exports]
    found = in_the_way(Path(recipe.output), paths)
    if found is not None:
        name, problem = found
        key: Key = ("output",)
        if name in paths:
            key = ("exports", paths.index(name), "path")
        raise recipe.document.error(key, problem)


def _check_device(recipe: Recipe) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        ConfigError: It cannot.
    """
    kind, _, number = recipe.device.partition(":")
    count = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }[kind]
    if int(number or 0) >= count:
        there = f"there are {count}" if count else "this torch finds none here"
        problem = f"{recipe.device}: {there}; use cpu, or leave it out"
        raise recipe.document.error(("device",), problem)


def _no_preprocessing(recipe: Recipe) -> CoRaError:
    return recipe.document.error(
        ("data", "preprocessing"),
        "the model does not say how images are made its input; give size, mean and std",
    )


def _images(
    recipe: Recipe, plan: _Plan, net: nn.Module
) -> tuple[Recipe, Subset[Item], Subset[Item]]:
    """Draw the images; return the recipe with all that was decided for it."""
    data = make(recipe, "data", plan.data)
    own = any(getattr(recipe.test, name) for name in IMAGES)
    test = make(recipe, "test", plan.test) if own else None
    wanted = preprocessing(recipe, net)
    process = transform(recipe, wanted)
    for source, listed in ((data, plan.data), (test, plan.test)):
        if source is not None:
            source.transform = process
        if listed is not None and process is None:
            raise _no_preprocessing(recipe)
    calibrating, judging = drawn(recipe, data, test)
    resolved = replace(
        recipe,
        data=replace(recipe.data, images=len(calibrating), preprocessing=wanted),
        test=replace(recipe.test, images=len(judging)),
        exports=plan.chosen.exports,
    )
    return resolved, calibrating, judging
