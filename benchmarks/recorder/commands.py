"""What is recorded of the commands: `run` with both toolkits, and `brevitas-ptq`."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.numpy import load

from cora_plugin.cli import main
from recorder import files
from recorder.entries import Entries, Room
from recorder.nets import UNSEEN
from recorder.values import of_arrays, of_file, of_report

RECIPES: dict[str, dict[str, Any]] = {
    "brevitas": {
        "toolkit": "brevitas",
        "exports": [
            "onnx_qcdq",
            {"format": "onnx_qcdq", "path": "packed.onnx", "packed": True},
            {"format": "onnx_qcdq", "path": "int8.onnx", "int8_kernels": True},
            "qonnx",
            "torch_qcdq",
            "adapters",
        ],
    },
    "brevitas, gptq and bias correction": {
        "toolkit": "brevitas",
        "ptq": {"weight_bits": 3, "gptq": True, "bias_correction": True},
        "cora": {"budget": "0.2 bits"},
    },
    "brevitas, depthwise and layer bits": {
        "toolkit": "brevitas",
        "ptq": {"depthwise_bits": 8, "layer_bits": {"p*": 6}, "equalize_iters": 2},
    },
    "brevitas, no adapters": {"toolkit": "brevitas", "cora": False},
    "nncf": {
        "toolkit": "nncf",
        "exports": [
            "openvino",
            {"format": "openvino", "path": "int8.xml", "int8_kernels": True},
            "onnx",
            {"format": "onnx", "path": "int8.onnx", "int8_kernels": True},
            "adapters",
        ],
    },
    "nncf, bias correction off": {
        "toolkit": "nncf",
        "ptq": {"weight_bits": 2, "first_last_bits": 4, "bias_correction": False},
        "cora": {"budget": "0.2 bits", "search": "uniform"},
    },
    "nncf, no adapters": {
        "toolkit": "nncf",
        "ptq": {"bias_correction": True},
        "cora": False,
    },
}
"""What each recipe says beside the net, its images and `DEFAULTS`."""

DEFAULTS = {
    "model": {"factory": "recorder.nets:net"},
    "data": {"factory": "recorder.nets:labelled", "images": 48},
    "ptq": {"weight_bits": 3},
    "cora": {"budget": "0.3 params"},
}


def _run(recipe: dict[str, Any], room: Room) -> dict[str, Any]:
    path, out = room.folder / "recipe.yaml", room.folder / "out"
    path.write_text(yaml.safe_dump(DEFAULTS | recipe | {"output": str(out)}))
    checked = main(["run", str(path), "--check"])
    code = main(["run", str(path), "--set", "data.seed=1"])
    report = json.loads((out / "report.json").read_text())
    figures = ("top1", "agreement", "kl", "bits")
    return {
        "exit codes": [checked, code],
        "rows": {r["model"]: {k: r.get(k) for k in figures} for r in report["rows"]},
        "report": of_report(report["cora"]) if report["cora"] else None,
        "exports": {
            export["path"]: {"bytes told": export["bytes"]}
            | _read(out / export["path"])
            for export in report["exports"]
        },
        "names": sorted(p.name for p in out.iterdir() if p.suffix != ".png"),
    }


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        tensors = load(path.read_bytes())
        return {"file": of_file(path), "tensors": of_arrays(tensors.values())}
    return files.of_any(path, UNSEEN[:1])  # the batch that `run` exports with


def _imagenet(flags: list[str], room: Room) -> dict[str, Any]:
    """Brevitas' ImageNet script on a SqueezeNet of random weights and noise."""
    _photos(room.folder)
    out = room.folder / "out"
    folders = {n: room.folder / n for n in ("calibration", "validation")}
    with _weights(room.folder):
        code = main(
            [
                "brevitas-ptq",
                "--model-name=squeezenet1_1",
                *(f"--{name}-dir={path}" for name, path in folders.items()),
                "--calibration-samples=6",
                "--batch-size-calibration=3",
                "--workers=1",
                "--target-backend=layerwise",
                "--weight-bit-width=4",
                "--weight-quant-granularity=per_channel",
                "--graph-eq-iterations=1",
                f"--export-dir={out}",
                "--cora-held-out=0.34",
                *flags,
            ]
        )
    found: dict[str, Any] = {"exit code": code}
    report = json.loads((out / "cora_report.json").read_text())
    for path in sorted(out.glob("*.onnx")):
        (shape,) = (
            [side.dim_value for side in each.type.tensor_type.shape.dim]
            for each in onnx.load(path).graph.input
        )
        random = torch.Generator().manual_seed(0)
        images = torch.randn(shape, generator=random)
        found[path.suffix] = files.of_onnx(path, images)
    return found | {"report": of_report(report)}


def _photos(root: Path) -> None:
    """Noise in folders, a folder a class."""
    random = np.random.default_rng(0)
    for split, count in (("calibration", 6), ("validation", 2)):
        for index in range(count):
            folder = root / split / f"class{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((256, 256)).save(folder / f"{index}.png")


@contextmanager
def _weights(root: Path) -> Iterator[None]:
    """Random weights where torch.hub keeps what it has downloaded before."""
    torch.manual_seed(0)
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    checkpoints = root / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    path = checkpoints / weights.url.rpartition("/")[2]
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(root)
    try:
        yield
    finally:
        del os.environ["TORCH_HOME"]
        if before is not None:
            os.environ["TORCH_HOME"] = before


ENTRIES: Entries = {
    **{f"run/{name}": partial(_run, recipe) for name, recipe in RECIPES.items()},
    "brevitas-ptq/default": partial(
        _imagenet, ["--cora", "--cora-budget=0.1", "--export-onnx-qcdq"]
    ),
    "brevitas-ptq/gptq, no bias correction": partial(
        _imagenet, ["--cora=budget=0.1,search=uniform", "--gptq", "--no-bias-corr"]
    ),
}
