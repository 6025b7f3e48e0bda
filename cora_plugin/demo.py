"""The demo: a real ConvNet, quantized until it breaks, repaired, exported, run."""

import contextlib
import copy
import dataclasses
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cora_plugin.config import CoRaConfig
from cora_plugin.demo_data import calibration_images, test_images
from cora_plugin.demo_model import efficientnet_lite0, plain_norms, static_padding
from cora_plugin.divergence import divergence
from cora_plugin.report import Report

CALIBRATION_IMAGES = 192
CROPS_PER_PHOTO = 5

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def run_demo(output: Path, settings: str, weight_bits: int, act_bits: int) -> None:
    """Print the demo's table; write `lite0.onnx`, `report.json` and `report.png`.

    Args:
        output: The folder, made if need be.
        settings: What adapters to add, as `CoRaConfig` reads it.
        weight_bits: Bit width that Brevitas quantizes weights to.
        act_bits: And activations.
    """
    config = CoRaConfig.of(settings)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    with _quiet(console, "loading Brevitas, the network and the photos"):
        from cora_plugin.integrations.brevitas import apply_cora, export_onnx_qcdq
        from cora_plugin.integrations.brevitas.recipe import logits, quantize_ptq

        images, labels = test_images(CROPS_PER_PHOTO)
        calibration = calibration_images(CALIBRATION_IMAGES)
        net = plain_norms(static_padding(efficientnet_lite0(), images[:1]))
        loader = DataLoader(
            TensorDataset(calibration, torch.zeros(len(calibration))), batch_size=16
        )
    scores = _Scores(_float_logits(net, images), labels)
    scores.add("float", scores.reference, 32.0, 0.0)

    name = f"W{weight_bits}A{act_bits}"
    quantized, seconds = _timed(
        console,
        f"Brevitas PTQ at {name}",
        quantize_ptq,
        net,
        loader,
        weight_bits,
        act_bits,
    )
    plain = logits(quantized, images)
    best: tuple[nn.Module, Report] | None = None
    rows: list[tuple[str, Tensor, Report, float]] = []
    for label, variant in (
        ("svd, uniform ranks", {"search": "uniform", "metric": "svd"}),
        ("qera-exact, uniform ranks", {"search": "uniform", "metric": "qera-exact"}),
        (f"{config.metric}, {config.search} ranks", {}),
    ):
        model = copy.deepcopy(quantized)
        chosen = dataclasses.replace(config, **variant)  # type: ignore[arg-type]
        report, spent = _timed(
            console,
            f"adapters: {label}",
            apply_cora,
            loader,
            model,
            chosen,
        )
        rows.append((f"+ {label}", logits(model, images), report, spent))
        best = model, report
    scores.add(f"Brevitas {name}", plain, rows[0][2].equivalent_bits_before, seconds)
    for label, out, report, spent in rows:
        scores.add(label, out, report.equivalent_bits, spent)
    if best is None:
        return
    model, report = best

    path = output / "lite0.onnx"
    _timed(console, f"exporting {path}", export_onnx_qcdq, model, images[:1], path)
    exported = _run_onnx(path, images)
    report.to_json(output / "report.json")
    report.plot(output / "report.png")
    console.print(scores.table(f"EfficientNet-Lite0, {len(images)} test images"))
    same = (exported.argmax(1) == rows[-1][1].argmax(1)).float().mean()
    console.print(
        f"{path} ({path.stat().st_size / 1e6:.1f} MB) in onnxruntime: the class that "
        f"torch gives for {same:.1%} of the images\n"
        f"{output / 'report.json'}, {output / 'report.png'}: rank and error by layer"
    )


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


@torch.no_grad()
def _float_logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in images.split(32)])


def _run_onnx(path: Path, images: Tensor) -> Tensor:
    """Logits of an ONNX file exported for single images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = [session.run(None, {name: x.numpy()})[0] for x in images.split(1)]
    return torch.cat([torch.from_numpy(output) for output in outputs])


@contextlib.contextmanager
def _quiet(console: Console, what: str) -> Iterator[None]:
    """Say what is being waited for, in place of what the toolkits say."""
    with (
        console.status(what),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _timed(
    console: Console,
    what: str,
    work: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> tuple[Result, float]:
    """Do some work; return what it returns, and its seconds."""
    start = time.perf_counter()
    with _quiet(console, what):
        result = work(*args, **kwargs)
    seconds = time.perf_counter() - start
    console.print(f"{what}: {seconds:.0f} s")
    return result, seconds
