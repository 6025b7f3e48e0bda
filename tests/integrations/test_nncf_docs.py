"""Every Python example of the documents that needs NNCF runs, as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cora_plugin.integrations.nncf import apply_cora, quantize_ptq

ROOT = Path(__file__).parents[2]
BLOCKS = [
    block
    for page in ("README.md", "docs/nncf.md")
    for block in re.findall(r"(?s)```python\n(.*?)```", (ROOT / page).read_text())
    if "nncf" in block
]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.ReLU6(),
            nn.Conv2d(8, 16, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.layers(x))


@pytest.mark.parametrize(
    "block",
    BLOCKS,
    ids=lambda block: next(
        line for line in reversed(block.splitlines()) if "(" in line
    ),
)
def test_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = Net().eval()
    images = torch.randn(40, 3, 16, 16)
    loader = DataLoader(TensorDataset(images, torch.zeros(40)), 8)
    names = {
        "model": net,
        "calib_loader": loader,
        "quantized_model": quantize_ptq(net, loader),
        "example_input": images[:1],
    }
    if "save_cora" in block:
        names["adapted_model"] = quantize_ptq(net, loader)
        apply_cora(names["adapted_model"], loader, "budget=0.05")
    exec(compile(block, "example", "exec"), names)
    if "report" in names:
        assert names["report"].budget_used > 0
    if "quantized" in names:
        assert names["quantized"].cora_report.budget_used > 0
    if "export_onnx" in block:
        assert (tmp_path / "model.onnx").stat().st_size > 0
    if "export_openvino" in block:
        assert (tmp_path / "model.bin").stat().st_size > 0


def test_examples_were_found():
    assert len(BLOCKS) >= 6
