"""Time and memory of CoRa, stage by stage, against a calibration pass of the float net.

python benchmarks/cost.py --model lite0 --toolkit brevitas
python benchmarks/cost.py --model lite0 --cora "budget=1.0 ptq,menu=3/4/5/6/8"
python benchmarks/cost.py --dense 512 --images 64 --toolkit brevitas   # big outputs

Times are ratios to one pass of the float network over the calibration images, measured
in the same run. Memory is the peak of the process's resident set above what it held
before CoRa began (Linux).
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from data import load
from dense import dense
from rich.console import Console
from rich.table import Table
from toolkits import ptq_options, run_flags, write_json
from torch import nn

from cora_plugin.config import CoRaConfig
from cora_plugin.integrations.toolkit import load_toolkit
from cora_plugin.progress import quiet, timed

STAGES = (
    "layers",
    "statistics",
    "guard",
    "search",
    "factors",
    "insert",
    "regression",
    "report",
)


def main() -> None:
    """Run the benchmark that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    run_flags(parser)
    parser.add_argument("--cora", default="budget=0.05", help="as CoRaConfig reads it")
    parser.add_argument("--dense", type=int, help="in place of a model; side of images")
    parser.add_argument("--images", type=int, default=64, help="with --dense")
    flags = parser.parse_args()

    with quiet():
        big = flags.dense is not None
        task = dense(flags.dense, flags.images) if big else load(flags.model)
        loader = task.loader(4 if big else 32)
        toolkit = load_toolkit(flags.toolkit)
        options = ptq_options(toolkit, flags)
        batches = loader if big else task.loader()
        quantized = toolkit.quantize(task.net, batches, options)
    run_once(task.net, [next(iter(loader))])  # warm up
    one = min(timed(None, "", run_once, task.net, loader)[1] for _ in range(3))
    before = resident("VmRSS")
    reset_peak()
    planning: dict[str, float] = {}
    plan = None
    if CoRaConfig.of(flags.cora).widths:
        plan, seconds = timed(None, "", toolkit.plan, quantized, flags.cora, True)
        planning["bit widths planned"] = seconds
        again = timed(None, "", toolkit.quantize_planned, quantized, plan)
        quantized, planning["quantized again, by the toolkit"] = again
    report, total = timed(None, "", toolkit.adapt, quantized, flags.cora, plan)
    total += sum(planning.values())
    peak = resident("VmHWM") - before

    row: dict[str, Any] = {
        "model": task.name,
        "toolkit": flags.toolkit,
        "float_pass_seconds": one,
        "passes": total / one,
        "peak_bytes": peak,
        **{stage: seconds / one for stage, seconds in planning.items()},
        **{stage: report.seconds[stage] / one for stage in STAGES},
    }
    table = Table(title=f"CoRa on {task.name}, {flags.toolkit}: {flags.cora}")
    table.add_column("stage")
    table.add_column("float passes", justify="right")
    for stage in (*planning, *STAGES, "passes"):
        name = "all" if stage == "passes" else stage
        table.add_row(name, f"{row[stage]:.2f}", end_section=stage == STAGES[-1])
    console = Console()
    console.print(table)
    console.print(
        f"one float pass over {len(task.calibration)} images: {one:.2f} s; "
        f"peak memory above the start: {peak / 2**30:.2f} GiB"
    )
    write_json(flags.json, row)


@torch.no_grad()
def run_once(net: nn.Module, batches: Iterable[Any]) -> None:
    """One pass, which keeps no outputs."""
    for images, _ in batches:
        net(images)


def reset_peak() -> None:
    """Let `resident("VmHWM")` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes that the process holds now, `VmRSS`, or held at most, `VmHWM`."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
