"""Runs the demo: the network, quantized until it breaks, repaired, exported, run."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cora_plugin.compare.experiment import Arm, Variant, variants
from cora_plugin.compare.html import Page, write_html
from cora_plugin.compare.rows import (
    MENU,
    NONE,
    Row,
    method_name,
    settings,
    show,
    table,
)
from cora_plugin.compare.task import Task
from cora_plugin.config import Budget, CoRaConfig, RefineConfig
from cora_plugin.demo.data import calibration_images, test_images
from cora_plugin.demo.files import package_folder
from cora_plugin.demo.model import efficientnet_lite0
from cora_plugin.integrations.toolkit import (
    Toolkit,
    install_line,
    load_toolkit,
    toolkits,
)
from cora_plugin.progress import quiet, timed
from cora_plugin.recipe.plain import plain_norms, static_padding

NEEDED = ("matplotlib", "onnxruntime", "foolbox", "timm")
"""Packages of the demo, some of which are used only when minutes of work are done."""

METHODS = ("svd uniform", "qera-exact uniform")
"""From the literature, for comparison; nothing but the closed form."""


def run_demo(
    output: Path,
    cora: str,
    weight_bits: int = 4,
    act_bits: int = 8,
    names: Sequence[str] = (),
    *,
    methods: Sequence[str] = METHODS,
    calibration_count: int = 192,
    crops_per_photo: int = 5,
    size: int = 224,
    menu: Sequence[int] = MENU,
) -> list[Row]:
    """Print the demo's table; write ONNX files, reports and their pictures.

    Args:
        output: The folder, made if need be.
        cora: What adapters to add, as `CoRaConfig` reads it.
        weight_bits: Bit width that weights are quantized to.
        act_bits: And activations.
        names: Toolkits, one after the other; none stands for the first that is known.
        methods: Names of methods to compare with, at the same budget.
        calibration_count: Number of images that calibrate.
        crops_per_photo: Number of test images of each of the twenty photos.
        size: Height and width of the images.
        menu: Bit widths that are planned in the bits of plain PTQ.

    Returns:
        The rows of the table.

    Raises:
        CoRaError: The settings are wrong, or there is no such toolkit.
        ModuleNotFoundError: A package of the demo is not installed.
        OSError: The folder cannot be written to.
    """
    config = CoRaConfig.of(cora)
    for package in NEEDED:
        package_folder(package)
    console = Console(file=sys.stdout)  # Its own: `quiet` hides what toolkits print.
    with quiet(console, "loading the toolkit, the network and the photos"):
        tools = [_toolkit(name) for name in names or toolkits()[:1]]
        output.mkdir(parents=True, exist_ok=True)
        task = _task(calibration_count, crops_per_photo, size)
    float_bits = {"equivalent_bits": 32.0, "seconds": 0.0}
    rows = [task.judge(task.reference, label="float", **float_bits)]
    lines, reports = [], {}
    for toolkit in tools:
        toolkit.prepare(console)
        options = toolkit.options(weight_bits=weight_bits, act_bits=act_bits)
        title = f"{toolkit.title} W{weight_bits}A{act_bits}"
        arms = _arms(config, methods, menu)
        for variant in variants(toolkit, task, options, arms, console=console):
            with quiet(console, f"{toolkit.title}, running {len(task.test)} images"):
                outputs = toolkit.outputs(variant.model, task.test)
            label = _label(title, variant)
            named = {"label": label, "toolkit": toolkit.name}
            rows.append(task.judge(outputs, **named, **variant.about))
            if variant.report is not None:
                reports[f"{title} {label}"] = variant.report
        # The last is what was asked for.
        path = output / f"lite0-{toolkit.name}.onnx"
        _write(toolkit, variant, task.test[:1], path, console)
        same = _run_onnx(path, task.test).argmax(1) == outputs.argmax(1)
        lines.append(
            f"{path} ({path.stat().st_size / 1e6:.1f} MB), run by onnxruntime: torch's "
            f"class for {same.double().mean():.1%} of the images; ranks and errors by "
            f"layer beside it in .json and .png"
        )
    title = (
        f"{task.name}, {len(task.test)} crops of labelled ImageNet photos, KL to float"
    )
    show(table(rows, {"model": "label"}, title), console)
    page = Page(
        title=f"The demo of cora-plugin: {task.name}",
        rows=rows,
        names={"toolkit": "toolkit", "model": "label"},
        notes=[title],
        layers=reports,
        settings=f"cora: {cora}\nweight bits: {weight_bits}\nact bits: {act_bits}",
    )
    write_html(page, output / "report.html")
    lines.append(f"{output / 'report.html'}: the table with plots, layers, settings")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    return rows


def _toolkit(name: str) -> Toolkit[Any]:
    try:
        return load_toolkit(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo needs the package {error.name}, which is not installed; "
            f"{install_line(name, 'demo')}",
            name=error.name,
        ) from error


def _task(calibration_count: int, crops_per_photo: int, size: int) -> Task:
    images, labels = test_images(crops_per_photo, size)
    calibration = calibration_images(calibration_count, size)
    net = plain_norms(static_padding(efficientnet_lite0(), images[:1]))
    return Task("EfficientNet-Lite0", net, calibration, images, labels)


def _arms(config: CoRaConfig, methods: Sequence[str], menu: Sequence[int]) -> list[Arm]:
    """Those to compare with, at the budget that was asked for, and what was asked for.

    The former add nothing to the closed form.
    """
    plain = dataclasses.replace(
        config, alternations=0, bias_correction="off", refine=RefineConfig()
    )
    arms = [Arm(each, dataclasses.replace(plain, **settings(each))) for each in methods]
    if not config.widths and not config.sweep and config.search == "spectral":
        planned = dataclasses.replace(
            config, budget=Budget(1.0, "ptq"), menu=tuple(menu)
        )
        arms.append(Arm("widths and adapters in the bits of PTQ", planned))
    return [*arms, Arm(method_name(config), config)]


def _label(title: str, variant: Variant) -> str:
    if variant.method != NONE:
        return f"+ {variant.method}"
    return f"{title}, biases corrected" if variant.recipe.endswith("+bc") else title


def _write(
    toolkit: Toolkit[Any],
    variant: Variant,
    example: Tensor,
    path: Path,
    console: Console,
) -> None:
    """Write a model's ONNX file, its report and the report's picture."""
    _, export = toolkit.onnxruntime_format()
    timed(console, f"exporting {path}", export.write, variant.model, example, path)
    if variant.report is not None:
        variant.report.to_json(path.with_suffix(".json"))
        variant.report.plot(path.with_suffix(".png"))


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    """Outputs of an ONNX file, image by image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [session.run(None, {name: x.numpy()})[0] for x in images.split(1)]
    return torch.cat([torch.from_numpy(output) for output in outputs])
