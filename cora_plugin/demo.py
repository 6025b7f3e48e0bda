"""The demo: a real ConvNet, quantized until it breaks, repaired, exported, run."""

import copy
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cora_plugin.config import CoRaConfig, FitConfig
from cora_plugin.demo_data import calibration_images, test_images
from cora_plugin.demo_files import package_folder
from cora_plugin.demo_model import efficientnet_lite0, plain_norms, static_padding
from cora_plugin.divergence import divergence
from cora_plugin.integrations.ptq import AbstractPTQ, host_package
from cora_plugin.progress import quiet, timed
from cora_plugin.report import Report

CALIBRATION_IMAGES = 192
CROPS_PER_PHOTO = 5

NEEDED = ("matplotlib", "onnxruntime", "foolbox", "timm")
"""Packages of the demo, some of which are used only when minutes of work are done."""


def run_demo(
    output: Path,
    settings: str,
    weight_bits: int,
    act_bits: int,
    toolkits: Sequence[str] = ("brevitas",),
) -> None:
    """Print the demo's table; write an ONNX file, a report and its picture.

    Args:
        output: The folder, made if need be.
        settings: What adapters to add, as `CoRaConfig` reads it.
        weight_bits: Bit width that weights are quantized to.
        act_bits: And activations.
        toolkits: Names of hosts, one after the other.

    Raises:
        CoRaError: The settings are wrong.
        ModuleNotFoundError: A package of the demo is not installed.
        OSError: The folder cannot be written to.
    """
    config = CoRaConfig.of(settings)
    for package in NEEDED:
        package_folder(package)
    for package in toolkits:
        package_folder(package, f"demo,{package}")
    output.mkdir(parents=True, exist_ok=True)
    console = Console(file=sys.stdout)  # This one, which the toolkits are not shown.
    with quiet(console, "loading the toolkit, the network and the photos"):
        hosts = {name: host_package(name) for name in toolkits}
        images, labels = test_images(CROPS_PER_PHOTO)
        calibration = calibration_images(CALIBRATION_IMAGES)
        net = plain_norms(static_padding(efficientnet_lite0(), images[:1]))
        targets = torch.zeros(len(calibration), dtype=torch.long)
        loader = DataLoader(TensorDataset(calibration, targets), batch_size=16)
    scores = _Scores(_torch_logits(net, images), labels)
    scores.add("float", scores.reference, 32.0, 0.0)
    bits = {"weight_bits": weight_bits, "act_bits": act_bits}
    lines = []
    for name, host in hosts.items():
        toolkit: AbstractPTQ = host.PTQ(net, loader, **bits)
        for notice, work in toolkit.first_use():
            console.print(notice)
            timed(console, "preparing the toolkit", work)
        title = f"{toolkit.title} W{weight_bits}A{act_bits}"
        quantized, seconds = timed(console, title, toolkit.quantize)
        plain = _logits(console, toolkit, quantized, images)
        what = f"{toolkit.title}, its bias correction"
        corrected, more = timed(console, what, toolkit.corrected, quantized)
        better = _logits(console, toolkit, corrected, images)
        rows = [
            (title, *_adapted(console, toolkit, quantized, variant, title))
            for title, variant in _variants(config)
        ]
        before = rows[0][2].equivalent_bits_before
        scores.add(title, plain, before, seconds)
        scores.add(f"{title}, biases corrected", better, before, more)
        for title, model, report, spent in rows:
            logits = _logits(console, toolkit, model, images)
            scores.add(f"+ {title}", logits, report.equivalent_bits, spent)
        path = output / f"lite0-{name}.onnx"
        export = getattr(host, toolkit.onnx_exporter)
        timed(console, f"exporting {path}", export, model, images[:1], path)
        report.to_json(path.with_suffix(".json"))
        report.plot(path.with_suffix(".png"))
        same = _run_onnx(path, images).argmax(1) == logits.argmax(1)
        lines.append(
            f"{path} ({path.stat().st_size / 1e6:.1f} MB), run by onnxruntime: torch's "
            f"class for {same.double().mean():.1%} of the images; ranks and errors by "
            f"layer beside it in .json and .png"
        )
    title = f"EfficientNet-Lite0, {len(images)} crops of labelled ImageNet photos"
    console.print(scores.table(title))
    for line in lines:
        console.print(line, highlight=False)


def _variants(config: CoRaConfig) -> list[tuple[str, CoRaConfig]]:
    """Two from the literature, nothing but the closed form, and what was asked for."""
    plain = dataclasses.replace(config, alternations=0, bias_correction="off")
    uniform = dataclasses.replace(plain, search="uniform", fit=FitConfig())
    return [
        ("svd, uniform", dataclasses.replace(uniform, metric="svd")),
        ("qera-exact, uniform", dataclasses.replace(uniform, metric="qera-exact")),
        (f"{config.metric}, {config.search}", config),
    ]


def _adapted(
    console: Console,
    toolkit: AbstractPTQ,
    quantized: nn.Module,
    config: CoRaConfig,
    title: str,
) -> tuple[nn.Module, Report, float]:
    model = copy.deepcopy(quantized)
    what = f"{toolkit.title}, adapters: {title}"
    report, seconds = timed(console, what, toolkit.adapt, model, config)
    return model, report, seconds


class _Scores:
    """The rows of the table: each model against the float one and the labels."""

    def __init__(self, reference: Tensor, labels: Tensor) -> None:
        self.reference = reference
        self._labels = labels
        self._rows: list[tuple[str, ...]] = []

    def add(self, name: str, logits: Tensor, bits: float, seconds: float) -> None:
        """Score a model's logits [N, 1000]."""
        distance = divergence(self.reference, logits)
        top1 = (logits.argmax(1) == self._labels).double().mean()
        self._rows.append(
            (
                name,
                f"{top1:.1%}",
                f"{distance.agreement:.1%}",
                f"{distance.kl:.3f}",
                f"{bits:.2f}",
                f"{seconds:.0f}",
            )
        )

    def table(self, title: str) -> Table:
        """All rows so far."""
        table = Table("model", title=title)
        for heading in ("top-1", "agreement", "KL to float", "bits/weight", "seconds"):
            table.add_column(heading, justify="right")
        for row in self._rows:
            table.add_row(*row)
        return table


def _logits(
    console: Console, toolkit: AbstractPTQ, model: nn.Module, images: Tensor
) -> Tensor:
    with quiet(console, f"{toolkit.title}, running {len(images)} images"):
        return toolkit.logits(model, images)


@torch.no_grad()
def _torch_logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in images.split(32)])


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    """Logits of an ONNX file, image by image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [session.run(None, {name: x.numpy()})[0] for x in images.split(1)]
    return torch.cat([torch.from_numpy(output) for output in outputs])
