"""Parity of a device with the CPU, and the seconds of each stage on both, as a table.

python benchmarks/device.py --model resnet50 --toolkit brevitas --json device.json

A network is quantized and given adapters on the CPU and on the device, by the default
settings, by a short Butterworth search and with a short refinement. Networks that need
no download have random weights: their seconds mean something, their accuracy does not.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from toolkits import write_json
from torch import Tensor, nn

from cora_plugin.compare.task import Task
from cora_plugin.integrations.toolkit import (
    Quantized,
    Toolkit,
    load_toolkit,
    toolkits,
)
from cora_plugin.progress import quiet
from cora_plugin.testing import Net, images, trained

ITERATIONS = 10
"""Of the Butterworth search and of the refinement."""

SETTINGS = {
    "default": {},
    "butterworth": {
        "search": "butterworth",
        "butterworth": {"iterations": ITERATIONS},
        "regression": False,
    },
    "refinement": {"refine": {"iterations": ITERATIONS, "every": ITERATIONS}},
}
"""What is run, by name; each at 5 % of the parameters."""

SIDES = (64, 128, 256, 512, 1024)
"""Sides of the matrices whose factorisation is timed."""


def small() -> Task:
    """The net of `cora_plugin.testing`, taught to tell colours."""
    torch.manual_seed(0)
    net = trained(Net())
    return Task("small", net, images(256, seed=2), images(64, seed=3))


def untrained(name: str, calibration: int) -> Task:
    """A torchvision network of random weights, and images for it."""
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    coarse = torch.randn(calibration + 32, 3, 14, 14)
    data = nn.functional.interpolate(coarse, size=224, mode="bilinear")
    with torch.no_grad():  # Batch norms as of a network that has seen images.
        net.train()(data[:32])
    return Task(name, net.eval(), data[32:], data[:32])


def task_of(name: str, calibration: int) -> Task:
    """A network with its data, by name: `small`, of the zoo, or of torchvision."""
    if name == "small":
        return small()
    if name in ("lite0", "squeezenet", "fashion"):
        from data import load

        return load(name)
    return untrained(name, calibration)


def main() -> None:
    """Run the benchmark that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="small,resnet18", help="names, with commas")
    parser.add_argument("--toolkit", default=toolkits()[0], help="names, with commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write what was measured here, too")
    flags = parser.parse_args()
    device = torch.device(flags.device)
    console, rows = Console(), list[dict[str, Any]]()
    found: dict[str, Any] = {
        "device": _named(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": rows,
    }
    for name in flags.model.split(","):
        with quiet():
            task = task_of(name, flags.calibration)
        for toolkit_name in flags.toolkit.split(","):
            toolkit = load_toolkit(toolkit_name)
            with quiet():
                places = torch.device("cpu"), device
                both = [quantized(toolkit, task, place) for place in places]
            for settings in flags.settings.split(","):
                with quiet():
                    pair = [adapted(toolkit, task, settings, *each) for each in both]
                rows += pair
                console.print(_table(pair))
                write_json(flags.json, found)
    found["factorisations"] = factorisations(device)
    console.print(_factorisations(found["factorisations"], device))
    write_json(flags.json, found)


def quantized(
    toolkit: Toolkit[Any], task: Task, device: torch.device
) -> tuple[Quantized[Any], dict[str, float], torch.device]:
    """Quantize on a device; with the seconds of that and of a pass of the float net."""
    net = copy.deepcopy(task.net).to(device)
    there = Task(task.name, net, task.calibration, task.test)
    there.float_outputs(task.calibration[:32])  # warm up
    _, once = timed(lambda: there.float_outputs(task.calibration), device)
    made, seconds = timed(
        lambda: toolkit.quantize(net, there.loader(32), toolkit.options()), device
    )
    return made, {"float pass": once, "quantize": seconds}, device


def adapted(
    toolkit: Toolkit[Any],
    task: Task,
    settings: str,
    made: Quantized[Any],
    seconds: dict[str, float],
    device: torch.device,
) -> dict[str, Any]:
    """Add adapters to a copy; what it came to, and how long each stage took."""
    given, config = made.copied(), {"budget": 0.05, **SETTINGS[settings]}
    report, total = timed(lambda: toolkit.adapt(given, config), device)
    return {
        "model": task.name,
        "toolkit": toolkit.name,
        "settings": settings,
        "device": device.type,
        "before": report.before.value,
        "after": report.after.value,
        "agreement": report.after.agreement,
        "ranks": [row.rank for row in report.layers],
        "seconds": {**seconds, **report.seconds, "adapters, all": total},
    }


def factorisations(device: torch.device) -> list[dict[str, Any]]:
    """Seconds of float64 factorisations by side, on the CPU and the device."""
    made: dict[str, Callable[[Tensor], Any]] = {
        "eigh": torch.linalg.eigh,
        "cholesky": torch.linalg.cholesky,
    }
    found = []
    for side in SIDES:
        root = torch.randn(side, 2 * side, dtype=torch.float64)
        gram = root @ root.mT
        for name, factor in made.items():
            row: dict[str, Any] = {"name": name, "side": side}
            for where in (torch.device("cpu"), device):
                there = gram.to(where)
                timed(lambda f=factor, x=there: f(x), where)  # warm up
                row[where.type] = min(
                    timed(lambda f=factor, x=there: f(x), where)[1] for _ in range(3)
                )
            found.append(row)
    return found


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What the work returns, and its seconds until the device is done, too."""
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def _factorisations(rows: list[dict[str, Any]], device: torch.device) -> Table:
    table = Table(title="float64 factorisations, milliseconds")
    for column in ("", "side", "cpu", device.type):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (f"{1e3 * row[each]:.2f}" for each in ("cpu", device.type))
        table.add_row(row["name"], str(row["side"]), *figures)
    return table


def _table(pair: list[dict[str, Any]]) -> Table:
    one, other = pair
    same = sum(a == b for a, b in zip(one["ranks"], other["ranks"], strict=True))
    table = Table(
        title=f"{one['model']}, {one['toolkit']}, {one['settings']}: {same} of "
        f"{len(one['ranks'])} ranks the same"
    )
    table.add_column("")
    for each in pair:
        table.add_column(each["device"], justify="right")
    for figure in ("before", "after"):
        table.add_row(f"KL {figure}", *(f"{each[figure]:.5f}" for each in pair))
    table.add_section()
    for stage in dict.fromkeys([*one["seconds"], *other["seconds"]]):
        figures = (f"{each['seconds'].get(stage, 0):.3f}" for each in pair)
        table.add_row(f"{stage}, s", *figures)
    return table


if __name__ == "__main__":
    main()
