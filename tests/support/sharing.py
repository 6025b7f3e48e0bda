"""Applies CoRa in one of several processes: `sharing.py RANK COUNT FILE`.

Each writes what it found into a folder beside the file at which they meet.
"""

import json
import sys
from pathlib import Path

import torch
from plain_host import PlainHost, quantized_copy, read_correction
from small_net import batches, net

from cora_plugin import CoRa, alone, processes, save_adapters
from cora_plugin.widths import plan_widths

QUICK = {"budget": 0.3, "positions": 0, "held_out": 0.25}

CASES = {
    "default": QUICK,
    "closed form": {**QUICK, "regression": False, "bias_correction": "off"},
    "cascade": {**QUICK, "regression": False, "bias_correction": "cascade"},
    "few kept": {**QUICK, "held_out_images": 10, "sensitivity_images": 12},
    "butterworth": {
        **QUICK,
        "search": "butterworth",
        "butterworth": {"iterations": 12, "batch_size": 12, "images": 40},
        "regression": False,
    },
    "refine": {**QUICK, "refine": {"iterations": 6, "images": 32, "batch_size": 8}},
    "labels": QUICK,
    "refine layers": {
        **QUICK,
        "refine": {"iterations": 6, "images": 32, "batch_size": 8, "scope": "layer"},
    },
}


def share():
    """This process's batches: with its images, image n of all is n of one process."""
    return [batch[processes.rank() :: processes.count()] for batch in batches()]


def found(case):
    """The report, and the model's correction."""
    host, data = PlainHost(quantized_copy(net(), bits=3)), share()
    if case == "labels":
        data = [(x, torch.arange(len(x)) % 10) for x in data]
    report = CoRa(CASES[case]).apply(host, data)
    return report, read_correction(host.model)


def planned():
    """Bit widths and treatments by layer."""
    config = {"budget": "1.0 ptq", "menu": [2, 3, 4, 8], "positions": 0}
    plan = plan_widths(PlainHost(net()), share(), config)
    return plan.widths, plan.treatments


def write(path, case):
    """Apply CoRa, and write the adapters and the figures of the report."""
    report, correction = found(case)
    notes = {
        "before": report.before.value,
        "after": report.after.value,
        "images": report.images,
        "held_out": report.held_out,
        "kept": [step.name for step in report.steps if step.kept],
        "ranks": {layer.name: layer.rank for layer in report.layers},
    }
    save_adapters(path, correction.adapters, correction.shifts, notes)


def apart(case):
    """Fail in one process, or do other things in each; the error in this one."""
    rank, metric, settings, data = processes.rank(), None, dict(QUICK), share()
    host = PlainHost(quantized_copy(net(), 4 if case == "models" and rank else 3))
    if case == "no data" and rank:
        data = []
    if case == "nan" and rank:
        data[3] = data[3] * torch.nan
    if case == "settings":
        settings["seed"] = rank
    if case == "metric":
        metric = (lambda: 1 / 0) if rank else (lambda: 1.0)
    try:
        CoRa(settings).apply(host, data, metric=metric)
    except Exception as error:
        carries = read_correction(host.model)
        return f"{type(error).__name__}: {error}, carries {len(carries.adapters)}"
    return "none"


APART = ("no data", "nan", "settings", "models", "metric")


def main():
    rank, count, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=count
    )
    folder = Path(f"{file}-{rank}")
    folder.mkdir()
    for case in CASES:
        write(folder / case, case)
    errors = {case: apart(case) for case in APART}
    (folder / "plan").write_text(str(planned()))
    # The first works by itself, and the others only wait for it.
    if not rank:
        with alone():
            write(folder / "alone", "default")
    torch.distributed.barrier()
    if rank == count - 1:
        errors["gone"] = "itself"
    else:
        errors["gone"] = apart("gone")
    (folder / "errors").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
