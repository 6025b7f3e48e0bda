"""Applies CoRa in one of several processes: `sharing.py RANK COUNT FILE CASES`.

CASES are "plain" or the name of a toolkit. Each process writes what it found into a
folder beside the file at which they meet.
"""

import json
import logging.handlers
import math
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from plain_host import PlainHost, quantized_copy, read_correction
from small_net import batches, net
from torch import nn

from cora_plugin import CoRa, alone, load_adapters, processes, save_adapters
from cora_plugin.qat import finetune
from cora_plugin.widths import plan_widths

QUICK = {"budget": 0.3, "held_out": 0.25}
ALONE = {**QUICK, "regression": False, "bias_correction": "off"}
REFINE = {"iterations": 20, "every": 5, "lr": 0.01, "images": 32, "batch_size": 8}

CASES = {
    "default": QUICK,
    "closed form": {**ALONE, "positions": 0},
    "cascade": {**QUICK, "regression": False, "bias_correction": "cascade"},
    "few kept": {**QUICK, "held_out_images": 10, "sensitivity_images": 12},
    "butterworth": {
        **ALONE,
        "search": "butterworth",
        "butterworth": {"iterations": 12, "batch_size": 12, "adapter_lr": 1e-3},
    },
    "refine": {**ALONE, "refine": REFINE},
    "refine layers": {**ALONE, "refine": {**REFINE, "scope": "layer"}},
    "target": {"budget": "2e-5 kl", "held_out": 0.25, "regression": False},
    "labels": QUICK,
    # Layers' grids of positions go from batch to batch, which processes see fewer of.
    "whole batches": {**QUICK, "positions": 0},
}
"""Settings that one process and several find the same with."""

TOOLKIT_CASES = "default", "butterworth"
"""Those that are tried with a toolkit, too."""

TRAININGS = {
    "shares": {},
    "the same held out": {},
    "accumulated": {"accumulate": 2, "clip": 1.0},
    "norms": {"norms": "estimated"},
    "resumed": {"checkpoint": "train.state", "every": 2},
}
"""Trainings that one process and several end the same with."""


class Wrapped(nn.Module):
    """The net, whose forward may be bound to batches of one size."""

    def __init__(self, size=-1):
        super().__init__()
        self.net, self.size = net(), size

    def forward(self, x):
        return self.net(x.reshape(self.size, 3, 12, 12))


def share(case="default"):
    """This process's data: image n of all processes is image n of one alone."""
    rank, count = processes.rank(), processes.count()
    if case == "whole batches":
        return batches()[rank::count]
    data = [batch[rank::count] for batch in batches()]
    if case == "labels":
        return [(x, torch.arange(len(x)) % 10) for x in data]
    return data


def write_plain(path, case):
    """Apply CoRa to the plain net; write adapters, and the figures of the report."""
    model = quantized_copy(Wrapped(16) if case == "whole batches" else net(), bits=2)
    report = CoRa(CASES[case]).apply(PlainHost(model), share(case))
    correction = read_correction(model)
    save_adapters(path, correction.adapters, correction.shifts)
    write_figures(path, report)


def write_toolkit(name, path, case):
    """The same with a toolkit."""
    toolkit = import_module(f"cora_plugin.integrations.{name}")
    # Activations are calibrated with all the data in each process.
    model = toolkit.quantize_ptq(Wrapped(), batches(), weight_bits=3)
    given = (share(), model) if name == "brevitas" else (model, share())
    report = toolkit.apply_cora(*given, CASES[case])
    toolkit.save_cora(path, model)
    write_figures(path, report)


class Norm(nn.Module):
    """A batch norm that the toolkits do not merge into the layer before it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.net = net()
        # Outputs of all but nothing are the same up to float32's digits.
        self.net[-1].weight.data *= 30

    def forward(self, x):
        return self.net(self.norm(x))


class Stopping(list):
    """Fails once, at its fifth batch."""

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 4 and not getattr(self, "stopped", False):
                self.stopped = True
                raise OSError("stopped")
            yield batch


def trained(name, case, folder):
    """Train a model that a toolkit quantized; the model, and the report."""
    toolkit = import_module(f"cora_plugin.integrations.{name}")
    torch.manual_seed(0)
    model = toolkit.quantize_ptq(Norm().eval(), batches(), weight_bits=3)
    settings = {"epochs": 2, "lr": 1e-3, "target": 0.02, **TRAININGS[case]}
    if "checkpoint" in settings:
        settings["checkpoint"] = str(folder / settings["checkpoint"])
    held_out = batches(2, seed=2)
    if case != "the same held out":
        held_out = [e[processes.rank() :: processes.count()] for e in held_out]
    torch.manual_seed(0)
    others = {"reference": Norm().eval(), "held_out": held_out, **settings}
    data = share()
    if case == "resumed":
        data = Stopping(data)
        try:
            finetune(model, data, **others)
        except OSError:
            data.stopped = True
    return model, finetune(model, data, **others)


def write_trainings(name, folder):
    """Write what each training ends with; the checkpoint is the first process's."""
    for case in TRAININGS:
        model, report = trained(name, case, folder)
        figures = {
            "before": report.before.value,
            "after": report.after.value,
            "kept": report.verdict.kept,
            "losses": report.losses,
            "rates": [each.rate for each in report.transitions.steps],
        }
        state = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
        torch.save((figures, state), folder / f"{case}.pt")


def write_figures(path, report):
    """Write what all processes should say."""
    figures = {
        "before": report.before.value,
        "after": report.after.value,
        "images": report.images,
        "held_out": report.held_out,
        "search_images": report.search_images,
        "kept": [step.name for step in report.steps if step.kept],
        "ranks": {layer.name: layer.rank for layer in report.layers},
    }
    path.with_name(f"{path.name}.json").write_text(json.dumps(figures))


def figures_of(path):
    """What was written beside adapters."""
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def agree(one, several):
    """What several processes found is, up to rounding, what one did."""
    expected, shifts, _ = load_adapters(one)
    assert expected
    for path in several:
        figures, theirs = figures_of(one), figures_of(path)
        for figure in ("before", "after"):
            assert math.isclose(figures.pop(figure), theirs.pop(figure), rel_tol=1e-3)
        assert figures == theirs
        adapters, moved, _ = load_adapters(path)
        assert adapters.keys() == expected.keys() and moved.keys() == shifts.keys()
        for name, adapter in adapters.items():
            assert adapter.forms == expected[name].forms
            # An integer of an adapter may round the other way.
            wanted = expected[name].merged()
            assert (adapter.merged() - wanted).norm() < 1e-3 * wanted.norm()
        for name, shift in moved.items():
            torch.testing.assert_close(shift, shifts[name], rtol=1e-3, atol=1e-5)
    # Of each other they are no rounding away.
    assert len({path.read_bytes() for path in several}) == 1


def planned():
    """Bit widths and treatments by layer."""
    config = {"budget": "1.0 ptq", "menu": [2, 3, 4, 8]}
    plan = plan_widths(PlainHost(net()), share(), config)
    return plan.widths, plan.treatments


APART = ("no data", "nan", "settings", "models", "metric")
"""What can go wrong in one process, or be another thing in each."""


def apart(case):
    """Let it go wrong; the error in this process, and the adapters left behind."""
    rank, metric, settings, data = processes.rank(), None, dict(QUICK), share()
    host = PlainHost(quantized_copy(net(), 4 if case == "models" and rank else 3))
    if case == "no data" and rank:
        data = []
    if case == "nan" and rank:
        data[3] = data[3] * torch.nan
    if case == "settings":
        settings["seed"] = rank
    if case == "metric":
        metric = partial(divide, 1, 1 - rank)
    try:
        CoRa(settings).apply(host, data, metric=metric)
    except Exception as error:
        return f"{type(error).__name__}: {error}", len(host.branches)
    return "none", len(host.branches)


def untrained(name, case):
    """Let a training go wrong; the error, and whether the model is as before."""
    from cora_plugin.testing.checks import assert_same_state

    toolkit = import_module(f"cora_plugin.integrations.{name}")
    model = toolkit.quantize_ptq(net(), batches(), weight_bits=3 + processes.rank())
    before = {n: v.clone() for n, v in model.state_dict().items()}
    data = share()
    if case == "batches":
        data = data[processes.rank() :]
    lr = 1e-3 * (1 + processes.rank() * (case == "settings"))
    try:
        finetune(model, data, reference=net(), held_out=share(), lr=lr)
    except Exception as error:
        assert_same_state(model, before)
        return f"{type(error).__name__}: {error}"
    return "none"


def late():
    """What a process says while another one comes a second later."""
    said = logging.handlers.BufferingHandler(100)
    processes.log.addHandler(said)
    processes.PATIENCE = 0.2
    if processes.rank():
        time.sleep(1)
    processes.gathered("ranks", processes.rank())
    processes.log.removeHandler(said)
    return [record.getMessage() for record in said.buffer]


def divide(one, other):
    return one / other


def write_plain_cases(folder, rank, count):
    """All cases on the plain net; the last process leaves before the others."""
    for case in CASES:
        write_plain(folder / case, case)
    errors = {case: apart(case) for case in APART}
    (folder / "plan").write_text(str(planned()))
    if not rank:  # The others only wait for it.
        with alone():
            write_plain(folder / "alone", "default")
    torch.distributed.barrier()
    (folder / "late").write_text("\n".join(late()))
    if rank < count - 1:
        errors["gone"] = apart("gone")
    (folder / "errors").write_text(json.dumps(errors))


def main():
    rank, count, file, cases = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=count
    )
    folder = Path(f"{file}-{rank}")
    folder.mkdir()
    if cases == "plain":
        write_plain_cases(folder, rank, count)
        return
    for case in TOOLKIT_CASES:
        write_toolkit(cases, folder / case, case)
    write_trainings(cases, folder)
    errors = {case: untrained(cases, case) for case in ("batches", "settings")}
    (folder / "errors").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


def run(folder, cases, count=2):
    """Run processes; the folder of each."""
    file = folder / "meet"
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(count), str(file), cases]
        )
        for rank in range(count)
    ]
    assert [each.wait(timeout=400) for each in started] == [0] * count
    return [Path(f"{file}-{rank}") for rank in range(count)]


if __name__ == "__main__":
    main()
