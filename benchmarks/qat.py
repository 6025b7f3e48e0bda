"""Training of quantized networks on Fashion-MNIST: learning rates and transition rates.

OMP_NUM_THREADS=2 python benchmarks/qat.py --toolkit brevitas --weights W2A4,W2A2 \
    --optimizers adamw --methods ptq,lr,trs --json benchmarks/qat/brevitas.json

Each method is tuned over as many values, with the first seed: `lr` over first learning
rates (scales of weights trained), `trs` over first target rates; the other seeds train
by the best value, by images that are held out. A row is one training; it is written as
soon as it is there, and rows that the file has are not made again: the benchmark can be
interrupted. `--jobs` of them run beside one another, on a GPU if there is one.
`python benchmarks/qat_table.py FILE…` prints tables of files.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import Any

import torch
from qat_table import best_rates
from toolkits import write_json
from torch import Tensor
from zoo import MODELS, PREPROCESS, fashion_mnist
from zoo.models import NETWORKS
from zoo.train import changed

from cora_plugin.integrations.toolkit import Quantized, load_toolkit, toolkits
from cora_plugin.progress import quiet
from cora_plugin.qat import QATReport, finetune

CALIBRATION = 512
HELD_OUT = 500
"""The last training images: they judge, and are not trained on."""

VALUES = {
    "lr": {
        "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    },
    "trs": {
        "sgd": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
        "adamw": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    },
}
"""What each method is tuned over, by optimizer."""

CURVES = ("curve", "measured")
CURVE = 10
"""Steps between two points of a row's curve."""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Row = dict[str, Any]


class Images:
    """Training batches, mirrored and shifted anew each epoch.

    Args:
        images: uint8 [N, 1, 28, 28].
        labels: [N].
        prepare: Makes them the network's input.
        size: Images a batch.
    """

    def __init__(self, images: Tensor, labels: Tensor, prepare: Any, size: int) -> None:
        self._images, self._labels = images, labels
        self._prepare, self._size = prepare, size

    def __len__(self) -> int:
        return len(self._images) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._images))[: len(self) * self._size]
        order = order.to(self._images.device)
        for chosen in order.split(self._size):
            yield changed(self._prepare(self._images[chosen])), self._labels[chosen]


def main() -> None:
    """Make the rows that the arguments ask for and the file lacks."""
    flags = _flags()
    rows: list[Row] = []
    if flags.json and flags.json.exists():
        rows = json.loads(flags.json.read_text())
    first, *others = flags.seeds
    # CUDA cannot be used in a process that was forked.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(flags.jobs, spawn) as pool:

        def begin(wanted: Iterable[Row]) -> set[Future[Row]]:
            return {
                pool.submit(_row, row, flags)
                for row in wanted
                if not any(row.items() <= each.items() for each in rows)
            }

        tuned = [(each, begin(_tuned(each, first, flags))) for each in _settings(flags)]
        running = set().union(*(futures for _, futures in tuned))
        while running or tuned:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                _add(future, rows, flags)
            for setting, futures in tuned:
                if not futures & running:
                    best = best_rates(rows, setting)
                    again = ({**setting, **best, "seed": seed} for seed in others)
                    running |= begin(again if best else ())
            tuned = [each for each in tuned if each[1] & running]


def _add(made: "Future[Row]", rows: list[Row], flags: Any) -> None:
    """Keep a row; one that failed is told, and does not end the others."""
    if error := made.exception():
        print(f"a row is lost: {error!r}", flush=True)
        return
    rows.append(made.result())
    write_json(flags.json, rows)
    shown = {name: value for name, value in rows[-1].items() if name not in CURVES}
    print(json.dumps(shown), flush=True)


def _settings(flags: Any) -> Iterator[Row]:
    """What is tuned and repeated, each as a row says it."""
    adapters = {"no": [False], "yes": [True], "both": [False, True]}[flags.adapters]
    for weights, adapted, optimizer, method in product(
        flags.weights, adapters, flags.optimizers, flags.methods
    ):
        about = {
            "model": flags.model,
            "toolkit": flags.toolkit,
            "weights": weights,
            "adapters": adapted,
            "test_images": flags.test_images,
            "method": method,
        }
        if method != "ptq":
            about |= {
                "optimizer": optimizer,
                "epochs": flags.epochs,
                "images": flags.images,
                "batch_size": flags.batch_size,
                "rate_momentum": flags.rate_momentum,
            }
        elif optimizer != flags.optimizers[0]:
            continue
        yield about


def _tuned(setting: Row, seed: int, flags: Any) -> Iterator[Row]:
    """What says which rows a setting is tuned by."""
    method = setting["method"]
    if method == "ptq":
        yield setting
        return
    for value in flags.values or VALUES[method][setting["optimizer"]]:
        rates = {"value": value, "first_lr": value, "other_lr": value}
        if method == "trs":
            rates |= {"first_lr": flags.first_lr, "other_lr": flags.other_lr}
        yield {**setting, **rates, "seed": seed}


def _row(wanted: Row, flags: Any) -> Row:
    key = wanted["weights"], wanted["adapters"]
    if key not in _BENCHES:
        _BENCHES[key] = _Bench(flags, *key)
    return _BENCHES[key].row(wanted)


_BENCHES: "dict[tuple[str, bool], _Bench]" = {}
"""What this process has quantized."""


class _Bench:
    """One quantized network, of which each row trains a copy."""

    def __init__(self, flags: Any, weights: str, adapters: bool) -> None:
        self._flags, self._device = flags, torch.device(flags.device)
        self._toolkit = load_toolkit(flags.toolkit)
        self._net = MODELS[flags.model]().to(self._device)
        self._prepare = PREPROCESS[flags.model]
        self._train = self._there(fashion_mnist("train"))
        images, labels = self._there(fashion_mnist("test"))
        self._test = self._prepare(images[: flags.test_images])
        self._labels = labels[: flags.test_images]
        bits, act = map(int, weights[1:].split("A"))
        options = self._toolkit.options(
            weight_bits=bits, act_bits=act, first_last_bits=flags.first_last_bits
        )
        calibration = self._prepare(self._train[0][:CALIBRATION])
        truth = self._train[1][:CALIBRATION]
        loader = list(zip(calibration.split(64), truth.split(64), strict=True))
        with quiet():
            self._base: Quantized[Any] = self._toolkit.quantize(
                self._net, loader, options
            )
            if adapters:
                self._toolkit.adapt(self._base, f"budget={flags.budget}")

    def row(self, wanted: Row) -> Row:
        """Train a copy, and test it on the test images."""
        base = self._base.copied()
        if wanted["method"] == "ptq":
            return {**wanted, "top1": self._top1(base)}
        torch.manual_seed(wanted["seed"])
        report = self._trained(base, wanted)
        steps = report.transitions.steps
        return {
            **wanted,
            "top1": self._top1(base),
            "kept": report.kept,
            "held_out_before": report.before.value,
            "held_out_after": report.after.value,
            "held_out_top1": report.top1[1],
            "near": report.transitions.near,
            "oscillating": report.transitions.oscillating,
            "window": report.transitions.window,
            "seconds": report.seconds,
            "overhead": report.overhead,
            "steps": len(steps),
            "torch_threads": torch.get_num_threads(),
            "device": self._named(),
            "curve": [
                [each.step, each.target, each.running, each.lr]
                for each in steps[::CURVE]
            ],
            "measured": [[each.step, each.top1] for each in report.measured],
        }

    def _named(self) -> str:
        gpu = self._device.type == "cuda"
        return torch.cuda.get_device_name() if gpu else self._device.type

    def _trained(self, base: Quantized[Any], wanted: Row) -> QATReport:
        flags, (images, labels) = self._flags, self._train
        last = slice(len(images) - HELD_OUT, None)
        held_out = zip(
            self._prepare(images[last]).split(100), labels[last].split(100), strict=True
        )
        used = min(flags.images, len(images) - HELD_OUT)
        loader = Images(images[:used], labels[:used], self._prepare, flags.batch_size)
        method, value = wanted["method"], wanted["value"]
        rates = {"lr": value} if method == "lr" else {"target": value}
        if method == "trs":
            rates["lr"] = wanted["first_lr"]
        return finetune(
            base.model,
            loader,
            reference=self._net,
            held_out=held_out,
            method=method,
            optimizer=wanted["optimizer"],
            epochs=flags.epochs,
            labels=flags.labels,
            other_lr=wanted["other_lr"],
            every=max(1, len(loader) * flags.epochs // flags.measurements),
            patience=100,
            device=self._device,
            rate_momentum=flags.rate_momentum,
            **rates,
        )

    def _top1(self, base: Quantized[Any]) -> float:
        outputs = self._toolkit.outputs(base.model, self._test)
        return float((outputs.argmax(1) == self._labels).double().mean())

    def _there(self, tensors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = tensors
        return images.to(self._device), labels.to(self._device)


def _flags() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(NETWORKS), default="fashion")
    parser.add_argument("--toolkit", choices=toolkits(), default=toolkits()[0])
    parser.add_argument("--weights", type=_names, default=["W2A4"], help="with commas")
    parser.add_argument("--first-last-bits", type=int, default=8)
    parser.add_argument("--optimizers", type=_names, default=["adamw"], help="and sgd")
    parser.add_argument("--methods", type=_names, default=["ptq", "lr", "trs"])
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--values", type=_numbers, help="of one method, to tune over")
    parser.add_argument("--first-lr", type=float, default=1e-3, help="trs begins there")
    parser.add_argument("--other-lr", type=float, default=1e-3, help="trs: all else")
    parser.add_argument("--rate-momentum", type=float, help="default: by the steps")
    parser.add_argument("--measurements", type=int, default=4, help="held out, a row")
    parser.add_argument("--labels", type=float, default=0.0)
    parser.add_argument("--adapters", choices=("no", "yes", "both"), default="no")
    parser.add_argument("--budget", default="0.05", help="of the adapters")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, default=60_000 - HELD_OUT)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=_integers, default=[0, 1, 2])
    parser.add_argument(
        "--json", type=Path, help="rows that are there are not repeated"
    )
    return parser.parse_args()


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
