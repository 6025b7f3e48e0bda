"""Two processes find for a model of Brevitas what one does."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
"""


def test_the_page_of_processes_runs(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "processes.md"
    (script,) = re.findall(r"(?s)```python\n(.*?)```", page.read_text())
    (tmp_path / "adapt.py").write_text(script)
    (tmp_path / "yours.py").write_text(YOURS)
    support = str(Path(sharing.__file__).parent)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "adapt.py"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": support},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("bits a weight") == 1
    adapters, _, _ = load_adapters(tmp_path / "adapters.safetensors")
    assert adapters
