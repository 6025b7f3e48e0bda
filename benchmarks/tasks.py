"""Networks of other tasks than classifying photos, with adapters and without.

python benchmarks/tasks.py --task demosaic --toolkit brevitas --json FILE

Rows are those of accuracy.py, by the distance that the task asks for; `measured` is the
task's own measure, in `unit`, higher where it is better. Weights come out of packages
(`pip install --no-deps demosaicnet facenet-pytorch`) or from `zoo.teach`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import NAMES
from rich.console import Console
from toolkits import write_json
from torch import Tensor, nn
from zoo.jobs import JOBS, Job

from cora_plugin.compare.experiment import Arm, variants
from cora_plugin.compare.rows import NONE, Row, settings, table
from cora_plugin.config import CoRaConfig
from cora_plugin.integrations.toolkit import load_toolkit, toolkits
from cora_plugin.objective import Objective, decide, measure
from cora_plugin.outputs import Outputs, joined, run
from cora_plugin.progress import quiet
from cora_plugin.report import Report

load = {name: job for name, job in JOBS.items()}


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Outputs:
    """A model's outputs for all images, by name, plain tensors."""

    def unpack(value: Any) -> Any:
        return getattr(value, "value", value)

    return joined([run(model.eval(), part, unpack) for part in images.split(50)])


HELD_OUT = ("before", "activations", "after")
"""What a report found on held-out inputs; with float weights and quantized activations
what adapters, which restore weights, can reach."""


def judged(
    job: Job,
    objective: Objective,
    reference: Outputs,
    outputs: Outputs,
    report: Report | None = None,
    **about: Any,
) -> Row:
    """The row of a model by its outputs for the test inputs."""
    found = measure(objective, reference, outputs)
    held_out = {}
    if report is not None:
        held_out = {name: getattr(report, name).value for name in HELD_OUT}
    return Row(
        model=job.name,
        top1=None,
        agreement=found.agreement,
        distance=found.value,
        objective=found.objective,
        details={
            "measured": job.measure(outputs),
            "unit": job.unit,
            **({"held_out": held_out} if held_out else {}),
        },
        **about,
    )


def rows(
    job: Job,
    name: str,
    budgets: list[str],
    bits: tuple[int, int],
    act_range: str | None = None,
) -> list[Row]:
    """The float network, and what a toolkit makes of it."""
    toolkit = load_toolkit(name)
    reference = answers(job.net, job.test)
    objective = decide(CoRaConfig(objective=job.objective), reference).objective
    weights = f"W{bits[0]}A{bits[1]}"
    given = job, objective, reference
    plain = {"recipe": "float", "method": NONE, "budget": ""}
    figures = {"weights": weights, "equivalent_bits": 32.0, "seconds": 0.0}
    made = [judged(*given, reference, toolkit="torch", **plain, **figures)]
    given_range = {} if act_range is None else {"act_range": act_range}
    options = toolkit.options(weight_bits=bits[0], act_bits=bits[1], **given_range)
    config = {**settings("default"), "objective": job.objective}
    arms = [Arm("default", {"budget": b, **config}, b) for b in budgets]
    for variant in variants(toolkit, job, options, arms):
        outputs = answers(variant.model, job.test)
        about = {"toolkit": name, "weights": weights, **variant.about}
        made.append(judged(*given, outputs, variant.report, **about))
    return made


def main() -> None:
    """Run the benchmark that the arguments describe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = toolkits()
    parser.add_argument("--task", choices=sorted(load), default="autoencoder")
    parser.add_argument("--toolkit", choices=known, default=known[0])
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--act-range", help="estimator; default: by --act-bits")
    parser.add_argument("--budgets", default="0.05", help="with commas")
    parser.add_argument("--json", type=Path, help="write what was measured here, too")
    flags = parser.parse_args()
    begun = time.perf_counter()
    with quiet():
        job = load[flags.task]()
    bits = flags.weight_bits, flags.act_bits
    with quiet():
        budgets = flags.budgets.split(",")
        found = rows(job, flags.toolkit, budgets, bits, flags.act_range)
    console = Console()
    console.print(table(found, NAMES, f"{job.name} W{bits[0]}A{bits[1]}"))
    for row in found:
        value, unit = row.details["measured"], row.details["unit"]
        name = f"{row.toolkit} {row.recipe} {row.method}"
        console.print(f"{name}: {value:.4g} {unit}", highlight=False)
        held_out = row.details.get("held_out", {})
        if held_out:
            said = ", ".join(f"{n} {value:.2g}" for n, value in held_out.items())
            console.print(f"  on held-out inputs: {said}", highlight=False)
    console.print(f"{time.perf_counter() - begun:.0f} s", highlight=False)
    write_json(flags.json, [row.to_dict() for row in found])


if __name__ == "__main__":
    main()
