"""Every Python example of the documents that needs Brevitas runs, as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from untouched import untouched

from cora_plugin import CoRaError
from cora_plugin.integrations.brevitas import apply_cora, private
from cora_plugin.integrations.brevitas.host import BrevitasHost
from cora_plugin.integrations.brevitas.recipe import logits, quantize_ptq

ROOT = Path(__file__).parents[2]
BLOCKS = [
    block
    for page in ("README.md", "docs/brevitas.md", "docs/budgets.md")
    for block in re.findall(r"(?s)```python\n(.*?)```", (ROOT / page).read_text())
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU6(),
        nn.Conv2d(8, 16, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


@pytest.fixture(scope="module")
def float_net():
    return net()


@pytest.fixture
def loader():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(40, 3, 16, 16), torch.zeros(40)), 8)


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if "nncf" not in b],
    ids=lambda block: next(x for x in block.splitlines() if "import" not in x and x),
)
def test_example_runs(block, float_net, loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "calib_loader": loader,
        "quant_model": quantize_ptq(float_net, loader),
        "fresh_quant_model": quantize_ptq(float_net, loader),
        "example_input": torch.randn(1, 3, 16, 16),
        "float_model": float_net,
        "model": float_net,
    }
    if "save_cora" in block:
        apply_cora(loader, names["quant_model"], "budget=0.05")
    exec(compile(block, "example", "exec"), names)
    if "load_cora" in block:
        x = names["example_input"]
        torch.testing.assert_close(
            logits(names["fresh_quant_model"], x), logits(names["quant_model"], x)
        )


def test_examples_were_found():
    assert len(BLOCKS) >= 7


def test_the_recipe_leaves_the_float_model_alone(float_net, loader):
    with untouched(float_net):
        quantize_ptq(float_net, loader, weight_bits=4, depthwise_bits=8)


def test_the_recipe_gives_each_kind_of_layer_its_bits(float_net, loader):
    model = quantize_ptq(float_net, loader, weight_bits=3, depthwise_bits=6)
    bits = [
        int(layer.quant_weight().bit_width)
        for layer in model.modules()
        if hasattr(layer, "quant_weight")
    ]
    assert bits == [8, 6, 3, 3]


def test_the_recipe_says_what_an_empty_loader_lacks(float_net):
    match = "the loader is empty"
    with untouched(float_net), pytest.raises(ValueError, match=match):
        quantize_ptq(float_net, [])


def test_bit_widths_of_single_layers(float_net, loader):
    nested = nn.Sequential(float_net[:5], float_net[5:])
    bits = {"1.*": 5, "1.9": 3, "0.3": 3}
    model = quantize_ptq(nested, loader, weight_bits=4, layer_bits=bits)
    found = {e.name: e.weight_bits for e in BrevitasHost(model).layers}
    assert found == {"0.0": 8, "0.3": 3, "1.5": 5, "1.9": 3}
    match = r"layer_bits: 'head\*' fits no layer"
    with untouched(float_net), pytest.raises(CoRaError, match=match):
        quantize_ptq(float_net, loader, layer_bits={"head*": 8})


def test_activation_ranges_of_least_error(float_net, loader):
    x = torch.cat([images for images, _ in loader])
    far = []
    for act_range in ("percentile", "mse"):
        host = BrevitasHost(
            quantize_ptq(float_net, loader, first_last_bits=3, act_range=act_range)
        )
        seen = []
        with torch.no_grad(), host.observe(lambda *run, to=seen: to.append(run)):
            host.run(x)
        name, quantized, _ = seen[0]
        assert name == "0"
        far.append(float((quantized - x).norm()))
    assert far[1] < 0.95 * far[0]


@pytest.mark.parametrize(
    "options, searched",
    [
        ({"act_bits": 4}, True),
        ({"act_bits": 5}, True),
        ({"act_bits": 6}, False),
        ({}, False),
        ({"act_bits": 4, "act_range": "percentile"}, False),
        ({"act_range": "mse"}, True),
    ],
)
def test_few_bits_get_ranges_of_least_error(float_net, loader, options, searched):
    model = quantize_ptq(float_net, loader, **options)
    found = [any(private.range_searches(q)) for q in private.integer_activations(model)]
    assert found == [searched] * 4


def test_an_unknown_range_is_refused(float_net, loader):
    match = "act_range: 'best' is unknown; use one of auto, percentile, mse"
    with untouched(float_net), pytest.raises(CoRaError, match=match):
        quantize_ptq(float_net, loader, act_range="best")
