"""Two processes find for a model of Brevitas what one does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sharing
from toolkit_processes import Shares

from cora_plugin import load_adapters


class TestBrevitas(Shares):
    """With Brevitas."""

    toolkit = "brevitas"


YOURS = """
from small_net import batches, net
import torch

from cora_plugin import load_adapters

float_model, images = net(), torch.cat(batches())
other_images = torch.cat(batches(2, seed=2))
"""


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        "accelerate.commands.accelerate_cli",
        *("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_page_of_processes_runs(launcher, tmp_path):
    ran = launched(launcher, "adapt.py", tmp_path)
    assert ran.stdout.count("bits a weight") == 1
    adapters, _, _ = load_adapters(tmp_path / "adapters.safetensors")
    assert adapters


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_page_trains(launcher, tmp_path):
    ran = launched(launcher, "train.py", tmp_path)
    assert ran.stdout.count("counting transitions") == 1


def launched(launcher, name, tmp_path):
    """What came of a script of the page of processes, in two of them."""
    page = Path(__file__).parents[2] / "docs" / "processes.md"
    scripts = re.findall(r"(?s)```python\n(.*?)```", page.read_text())
    (script,) = (each for each in scripts if each.startswith(f"# {name}"))
    (tmp_path / name).write_text(script)
    (tmp_path / "yours.py").write_text(YOURS)
    support = str(Path(sharing.__file__).parent)
    ran = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": support},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr
    return ran
