"""Names of layers that globs and markup read otherwise are pinned, saved and shown."""

import pytest
import torch
from interrupted_net import HOSTS, data
from torch import nn

NAMES = ("a[0]", "[red]", "b*", "c?")


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential()
        for index, name in enumerate(NAMES):
            layer = nn.Conv2d(3 if not index else 8, 8, 3, padding=1)
            self.stage.add_module(name, layer)
            self.stage.add_module(f"relu{index}", nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stage(x).mean((2, 3)))


def layers():
    return [f"stage.{name}" for name in NAMES]


@pytest.mark.parametrize("host", HOSTS)
def test_ranks_are_pinned_by_the_very_name(host):
    torch.manual_seed(0)
    model, _ = host(Odd().eval(), data())
    ranks = dict(zip(layers(), (0, 1, 2, 3), strict=True))
    config = {"budget": 0.9, "ranks": ranks, "metric": "svd"}
    report = host.apply(model, data(), config)
    found = {row.name: row.rank for row in report.layers if row.name in ranks}
    pinned = {name: rank for name, rank in ranks.items() if rank}
    assert not report.steps[0].kept or found == pinned
    assert {**found, **{n: 0 for n in report.skipped}}.keys() >= ranks.keys()
    assert all(name in str(report) for name in layers())


@pytest.mark.parametrize("host", HOSTS)
def test_bit_widths_are_set_by_the_very_name_and_adapters_travel(host, tmp_path):
    torch.manual_seed(0)
    net = Odd().eval()
    bits = dict(zip(layers()[1:], (3, 5, 6), strict=True))
    model, fresh = (host.quantized(net, data(), layer_bits=bits) for _ in range(2))
    report = host.apply(model, data(), {"budget": 0.9})
    found = {row.name: row.weight_bits for row in report.layers}
    assert {name: found[name] for name in bits} == bits
    if report.adapter_parameters:
        host.save(tmp_path / "adapters.safetensors", model)
        host.load(tmp_path / "adapters.safetensors", fresh, data()[0])
        same = [getattr(m(data()[0]), "value", m(data()[0])) for m in (model, fresh)]
        assert torch.equal(*same)
