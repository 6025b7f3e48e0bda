"""Brevitas' ImageNet PTQ script, `brevitas_ptq_imagenet_val`, with adapters in it.

The script has no hook for a plugin. So a copy of its main function runs, with helpers
of ours where adapters have to come in; Brevitas itself is not changed.
"""

import functools
import random
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import brevitas.config
import numpy as np
import torch
from torch import Tensor, nn

from cora_plugin.adapters.errors import ConfigError, CoRaError, DataError, FileError
from cora_plugin.config import CoRaConfig
from cora_plugin.integrations.brevitas import private
from cora_plugin.integrations.brevitas.algorithm import apply_cora, plan_bits
from cora_plugin.integrations.brevitas.bias import apply_cora_and_correct_biases
from cora_plugin.integrations.brevitas.export import export_onnx_qcdq
from cora_plugin.integrations.brevitas.host import BrevitasHost
from cora_plugin.integrations.brevitas.layers import snapshot
from cora_plugin.integrations.brevitas.recipe import TITLE
from cora_plugin.integrations.brevitas.rounding import check_blocks
from cora_plugin.integrations.doing import doing
from cora_plugin.report import Report
from cora_plugin.width_plan import WidthPlan


@dataclass(frozen=True)
class PTQResult:
    """The script's metrics (`quant_top1` in percent), its model, CoRa's report."""

    metrics: dict[str, float]
    model: nn.Module
    report: Report | None


@contextmanager
def stock_script() -> Iterator[ModuleType]:
    """Brevitas' `ptq_evaluate`, with all that it changes globally undone afterwards.

    Its import silences every warning and has Brevitas ignore missing keys of state
    dicts; its run seeds all generators.

    Raises:
        ModuleNotFoundError: A package that it needs is not installed.
    """
    missing_keys = brevitas.config.IGNORE_MISSING_KEYS
    states = random.getstate(), np.random.get_state()
    benchmark = torch.backends.cudnn.benchmark
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            # As after the first import, whichever this one is.
            warnings.simplefilter("ignore")
            brevitas.config.IGNORE_MISSING_KEYS = True
            try:
                script = private.ptq_script()
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"Brevitas' ImageNet script needs the package {error.name}; "
                    'pip install "cora-plugin[brevitas,cli]"',
                    name=error.name,
                ) from error
            yield script
    finally:
        brevitas.config.IGNORE_MISSING_KEYS = missing_keys
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.backends.cudnn.benchmark = benchmark


def ptq_imagenet(
    options: Namespace, config: CoRaConfig | None, report_path: Path
) -> PTQResult:
    """Run the script; adapters come after its PTQ and before its bias correction.

    Args:
        options: The script's options, as its own parser names them.
        config: What adapters to add; None adds none, and the run is Brevitas' own.
        report_path: The JSON file of the report.

    Raises:
        CoRaError: Something that the caller can change is wrong.
        OSError: A file cannot be written.
    """
    planned = config is not None and config.widths
    if planned and options.act_scale_computation_type != "static":
        raise ConfigError(
            ("menu",),
            "bit widths are planned when activations have been calibrated, which "
            f"--act-scale-computation-type={options.act_scale_computation_type} does "
            "not; use static, or no menu",
            "--cora",
        )
    with stock_script() as script:
        _check(script, options)
        Path(options.export_dir).mkdir(parents=True, exist_ok=True)
        report_path.parent.mkdir(parents=True, exist_ok=True)
        step = _Step(script, config)
        absent = private.missing_helpers(script.quantize_ptq_imagenet)
        if absent:
            raise CoRaError(
                "brevitas-ptq: this Brevitas' quantize_ptq_imagenet calls no "
                f"{', '.join(sorted(absent))}; brevitas 0.13 is supported"
            )
        function = private.with_helpers(script.quantize_ptq_imagenet, step, _told)
        with doing(TITLE, "its ImageNet script"):
            metrics, model = function(options)
        if step.report is not None:
            step.report.to_json(report_path)
        return PTQResult(metrics, model, step.report)


def _told(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of the script whose failures say which one it is."""

    @functools.wraps(step)
    def told(*args: Any, **kwargs: Any) -> Any:
        with doing(TITLE, f"{name}, a step of its ImageNet script"):
            return step(*args, **kwargs)

    return told


class _Step:
    """The script's helpers by their names, with adapters and exports that work in them.

    Adapters go in where bias correction begins, or else where validation does.
    """

    def __init__(self, script: ModuleType, config: CoRaConfig | None) -> None:
        self.report: Report | None = None
        self._script = script
        self._config = config
        self._loader: Any = None
        self._weights: dict[str, Tensor] = {}
        self._plan: WidthPlan | None = None

    def generate_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the first, which is for calibration."""
        loader = self._script.generate_dataloader(*args, **kwargs)
        if self._loader is None:
            self._loader = loader
        return loader

    def get_torchvision_model(self, name: str) -> nn.Module:
        """Say where weights are looked for when they cannot be downloaded."""
        try:
            model: nn.Module = self._script.get_torchvision_model(name)
        except OSError as error:
            folder = Path(torch.hub.get_dir(), "checkpoints")
            raise FileError(
                f"--model-name: the weights of {name} cannot be downloaded ({error}); "
                f"put torchvision's file of them into {folder}"
            ) from error
        return model

    def quantize_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Keep the float weights, which GPFQ and Qronos overwrite."""
        try:
            model: nn.Module = self._script.quantize_model(*args, **kwargs)
        except KeyError as error:  # of its tables of quantizers
            raise ConfigError(
                (),
                f"Brevitas has no quantizer with {error} for these flags; change "
                "--quant-format, or the --…-scale-…, --…-type or --…-granularity of "
                "weights or activations",
                "brevitas-ptq",
            ) from error
        self._weights = snapshot(model)
        return model

    def calibrate(self, loader: Any, model: nn.Module) -> None:
        """Calibrate, then plan the bit widths that a menu asks for."""
        self._script.calibrate(loader, model)
        if self._config is not None and self._config.widths:
            print("Planning bit widths:")
            self._plan = plan_bits(loader, model, self._config)
            BrevitasHost(model).widen(self._plan.layer_bits)

    def apply_learned_round(
        self, model: nn.Module, calibration_loader: Any, args: Namespace
    ) -> None:
        """Find blocks by the flag for it, which the script reads and forgets."""
        name = args.learned_round_block_name
        if args.learned_round_mode == "blockwise":
            check_blocks(model, name, (), "--learned-round-block-name")
        self._script.apply_learned_round(model, calibration_loader, args, name)

    def apply_bias_correction(self, loader: Any, model: nn.Module) -> None:
        """Correct what the adapters leave, if that helps."""
        if self._config is None:
            self._script.apply_bias_correction(loader, model)
        else:
            self._adapt(model, apply_cora_and_correct_biases)

    def quant_inference_mode(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Validate with adapters."""
        self._adapt(model)
        mode: AbstractContextManager[Any] = self._script.quant_inference_mode(model)
        return mode

    def export_onnx_qcdq(
        self, model: nn.Module, example: Tensor, path: str, opset_version: int | None
    ) -> None:
        """Export by the exporter that can write quantized biases, Brevitas' default."""
        export_onnx_qcdq(model, example, self._named(path), opset_version)

    def export_torch_qcdq(self, model: nn.Module, example: Tensor, path: str) -> None:
        """Export by Brevitas' exporter."""
        self._script.export_torch_qcdq(model, example, self._named(path))

    def _adapt(self, model: nn.Module, add: Callable[..., Report] = apply_cora) -> None:
        if self._config is not None and self.report is None:
            print("Adding CoRa's adapters:")
            given = self._config, self._weights, self._plan
            self.report = add(self._loader, model, *given)
        self._loader, self._weights = None, {}

    def _named(self, path: str) -> str:
        """With adapters, a name beside that of the file without."""
        if self.report is None:
            return path
        given = Path(path)
        stem = given.stem.removesuffix(".onnx").rstrip("_")  # of the script's .onnx.pt
        name = f"{stem}_cora{given.suffix}"
        return str(given.with_name(name))


def _check(script: ModuleType, options: Namespace) -> None:
    """Refuse at once what the script would fail with later, or in a loader's process.

    Raises:
        DataError: A folder of images is wrong.
        ConfigError: A count or a combination of flags is.
    """
    _check_folder("--calibration-dir", options.calibration_dir, 1)
    _check_folder("--validation-dir", options.validation_dir, 1)
    _check_folder(
        "--calibration-dir", options.calibration_dir, options.calibration_samples
    )
    for flag in ("workers", "calibration_samples"):
        if getattr(options, flag) < 1:
            name = "--" + flag.replace("_", "-")
            problem = f"{getattr(options, flag)}; pass 1 or more"
            raise ConfigError((), problem, name)
    try:
        script.validate_args(options)
    except AssertionError as error:
        raise ConfigError((), str(error), "brevitas-ptq") from error


def _check_folder(flag: str, folder: str | None, images: int) -> None:
    if folder is None:
        raise DataError(f"{flag}: pass a folder with a sub-folder of images a class")
    if not Path(folder).is_dir():
        raise DataError(f"{flag}: {folder} is not a folder")
    # Of the class that the script reads images with.
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files = (
        file
        for entry in Path(folder).iterdir()
        if entry.is_dir()
        for file in entry.rglob("*")
        if file.suffix.lower() in IMG_EXTENSIONS
    )
    found = sum(1 for _ in islice(files, images))
    if found < images:
        what = "no sub-folders with images" if not found else f"{found} images"
        way_out = "" if not found else "; pass --calibration-samples of at most that"
        raise DataError(f"{flag}: {folder} has {what}{way_out}")
