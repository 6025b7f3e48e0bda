"""How the cost of CoRa grows with layers, width and images.

python benchmarks/growth.py --json growth.json

A plain ConvNet of random weights, quantized by Brevitas at W4A8; three sizes of each, a
process a size on one thread. Seconds are those of the CPU, so that others on the
machine do not count; those of a stage are its share of the wall time.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from cost import STAGES, reset_peak, resident, run_once
from file_tables import growth_table
from toolkits import write_json
from torch import nn

from cora_plugin.integrations.toolkit import load_toolkit
from cora_plugin.progress import quiet, timed

BASE = {"layers": 8, "width": 32, "images": 128}
SIZES = {"layers": (4, 8, 16), "width": (16, 32, 64), "images": (64, 128, 256)}
SIDE = 16


def main() -> None:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write what was measured here, too")
    flags = parser.parse_args()
    load_toolkit("brevitas")  # Once, for all processes.
    sizes = [{**BASE, name: n} for name, each in SIZES.items() for n in each]
    once = list({json.dumps(size): size for size in sizes}.values())
    # Forked, as memory that one size has freed would count as there for the next.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = pool.map(_measured, once, chunksize=1)
    found = [{**size, **rows[once.index(size)]} for size in sizes]
    write_json(flags.json, found)
    print(growth_table(found))


def net(layers: int, width: int) -> nn.Module:
    """[N, 3, 16, 16] -> [N, 10] by so many 3×3 convolutions of one width."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(layers - 1):
        parts += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*parts, *head).eval()


def _measured(size: dict[str, int]) -> dict[str, Any]:
    layers, width, images = (size[name] for name in BASE)
    toolkit = load_toolkit("brevitas")
    random = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, SIDE, SIDE, generator=random)
    loader = [(batch, None) for batch in x.split(32)]
    float_net = net(layers, width)
    with quiet():
        quantized = toolkit.quantize(float_net, loader, toolkit.options())
    run_once(float_net, loader)  # Warms up.
    start = time.process_time()
    run_once(float_net, loader)
    one = time.process_time() - start
    before = resident("VmRSS")
    reset_peak()
    start = time.process_time()
    report, wall = timed(None, "", toolkit.adapt, quantized, "budget=0.1")
    seconds = time.process_time() - start
    peak = resident("VmHWM") - before
    stages = {each: report.seconds[each] * seconds / wall for each in STAGES}
    return {
        "float_pass": one,
        "seconds": seconds,
        "peak_bytes": peak,
        "stages": stages,
    }


if __name__ == "__main__":
    main()
