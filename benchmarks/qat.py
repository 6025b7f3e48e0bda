"""Training of quantized networks on Fashion-MNIST: learning rates and transition rates.

OMP_NUM_THREADS=2 python benchmarks/qat.py --toolkit brevitas --weights W2A4 \
    --optimizer adamw --methods ptq,lr,trs --json benchmarks/qat/w2a4-brevitas.json

Each method is tuned over as many values: `lr` over first learning rates (scales of
weights trained), `trs` over first target rates. A row is one training; it is written as
soon as it is there, and rows that the file has are not made again: the benchmark can be
interrupted. `python benchmarks/qat_table.py FILE…` prints tables of files.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
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

CURVE = 10
"""Steps between two points of a row's curve."""

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
        for chosen in order.split(self._size):
            yield changed(self._prepare(self._images[chosen])), self._labels[chosen]


def main() -> None:
    """Make the rows that the arguments ask for and the file lacks."""
    flags = _flags()
    rows: list[Row] = []
    if flags.json and flags.json.exists():
        rows = json.loads(flags.json.read_text())
    for adapters in (
        (False, True) if flags.adapters == "both" else ((flags.adapters == "yes"),)
    ):
        bench = None
        for wanted in _wanted(flags, adapters):
            if any(wanted.items() <= row.items() for row in rows):
                continue
            bench = bench or _Bench(flags, adapters)
            rows.append(bench.row(wanted))
            write_json(flags.json, rows)
            shown = {k: v for k, v in rows[-1].items() if k != "curve"}
            print(json.dumps(shown), flush=True)


def _wanted(flags: Any, adapters: bool) -> Iterator[Row]:
    """What says which rows these are."""
    about = {
        "model": flags.model,
        "toolkit": flags.toolkit,
        "weights": flags.weights,
        "adapters": adapters,
        "test_images": flags.test_images,
    }
    for method in flags.methods:
        if method == "ptq":
            yield {**about, "method": method}
            continue
        values = flags.values or VALUES[method][flags.optimizer]
        for value in values:
            for seed in flags.seeds:
                yield {
                    **about,
                    "method": method,
                    "optimizer": flags.optimizer,
                    "value": value,
                    "first_lr": flags.first_lr if method == "trs" else value,
                    "other_lr": flags.other_lr if method == "trs" else value,
                    "epochs": flags.epochs,
                    "images": flags.images,
                    "batch_size": flags.batch_size,
                    "rate_momentum": flags.rate_momentum,
                    "seed": seed,
                }


class _Bench:
    """One quantized network, of which each row trains a copy."""

    def __init__(self, flags: Any, adapters: bool) -> None:
        self._flags = flags
        self._toolkit = load_toolkit(flags.toolkit)
        self._net = MODELS[flags.model]()
        self._prepare = PREPROCESS[flags.model]
        self._train = fashion_mnist("train")
        images, labels = fashion_mnist("test")
        self._test = self._prepare(images[: flags.test_images])
        self._labels = labels[: flags.test_images]
        bits, act = map(int, flags.weights[1:].split("A"))
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
            "seconds": report.seconds,
            "overhead": report.overhead,
            "steps": len(steps),
            "torch_threads": torch.get_num_threads(),
            "curve": [
                [each.step, each.target, each.running, each.lr]
                for each in steps[::CURVE]
            ],
            "measured": [[each.step, each.top1] for each in report.measured],
        }

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
            optimizer=flags.optimizer,
            epochs=flags.epochs,
            labels=flags.labels,
            other_lr=wanted["other_lr"],
            every=max(1, len(loader) * flags.epochs // flags.measurements),
            patience=100,
            rate_momentum=flags.rate_momentum,
            **rates,
        )

    def _top1(self, base: Quantized[Any]) -> float:
        outputs = self._toolkit.outputs(base.model, self._test)
        return float((outputs.argmax(1) == self._labels).double().mean())


def _flags() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(NETWORKS), default="fashion")
    parser.add_argument("--toolkit", choices=toolkits(), default=toolkits()[0])
    parser.add_argument("--weights", default="W2A4", help="such as W4A4, W2A2")
    parser.add_argument("--first-last-bits", type=int, default=8)
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="adamw")
    parser.add_argument("--methods", type=_names, default=["ptq", "lr", "trs"])
    parser.add_argument("--values", type=_numbers, help="of one method, to tune over")
    parser.add_argument("--first-lr", type=float, default=1e-3, help="trs begins there")
    parser.add_argument("--other-lr", type=float, default=1e-3, help="trs: all else")
    parser.add_argument("--rate-momentum", type=float, default=0.99)
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
