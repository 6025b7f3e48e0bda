"""Time and memory of CoRa, stage by stage, against a calibration pass of the float net.

python benchmarks/cost.py --model lite0 --toolkit brevitas

Times are ratios to one pass of the float network over the calibration images, measured
in the same run. Memory is the peak of the process's resident set above what it held
before CoRa began (Linux).
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

from data import load
from rich.console import Console
from rich.table import Table
from toolkits import ptq, quiet, run_flags, write_json

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
    options = parser.parse_args()

    with quiet():
        task = load(options.model)
        toolkit = ptq(options.toolkit, task, options)
        model = toolkit.quantize()
    task.float_logits(task.calibration[:32])  # warm up
    passes = [_seconds(lambda: task.float_logits(task.calibration)) for _ in range(3)]
    one = min(passes)
    before = _resident("VmRSS")
    _reset_peak()
    start = time.perf_counter()
    with quiet():
        report = toolkit.adapt(model, options.cora)
    total = time.perf_counter() - start
    peak = _resident("VmHWM") - before

    row: dict[str, Any] = {
        "model": task.name,
        "toolkit": options.toolkit,
        "float_pass_seconds": one,
        "passes": total / one,
        "peak_bytes": peak,
        **{stage: report.seconds[stage] / one for stage in STAGES},
    }
    table = Table(title=f"CoRa on {task.name}, {options.toolkit}: {options.cora}")
    table.add_column("stage")
    table.add_column("float passes", justify="right")
    for stage in (*STAGES, "passes"):
        name = "all" if stage == "passes" else stage
        table.add_row(name, f"{row[stage]:.2f}", end_section=stage == STAGES[-1])
    console = Console()
    console.print(table)
    console.print(
        f"one float pass over {len(task.calibration)} images: {one:.2f} s; "
        f"peak memory above the start: {peak / 2**30:.2f} GiB"
    )
    write_json(options.json, row)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
