"""Alternation keeps the best iterate, and the host's quantization of what is left."""

import dataclasses

import pytest
import torch
from plain_host import PlainHost
from small_net import batches, net

from cora_plugin import CoRa, CoRaError
from cora_plugin.adapters import make_adapter
from cora_plugin.adapters.factor import Weighting, weighted_error
from cora_plugin.fitting import alternate
from cora_plugin.layer import Correction


def error(layer, adapter):
    left = layer.residual - adapter.merged().double()
    return weighted_error(layer.as_matrices(left), Weighting())


def test_the_error_falls_and_the_main_weight_is_the_hosts():
    host = PlainHost(net(), bits=3)
    metrics = {layer.name: Weighting() for layer in host.layers}
    adapters = {
        e.name: make_adapter(e.residual, e.operation, 2, Weighting())
        for e in host.layers
        if e.full_rank > 4
    }
    before = {e.name: e for e in host.layers}
    found = alternate(host, host.layers, adapters, metrics, 3)
    assert set(found.adapters) == set(adapters)
    assert found.weights.keys() == found.dequantized.keys() != set()
    quantized = host.quantize(found.weights)
    for name, dequantized in found.dequantized.items():
        assert torch.equal(dequantized, quantized[name])
        layer = dataclasses.replace(before[name], dequantized=dequantized)
        stood = error(before[name], adapters[name])
        assert error(layer, found.adapters[name]) < stood


def test_it_is_a_guarded_step():
    host = PlainHost(net(), bits=2)
    before = {name: value.clone() for name, value in host.model.state_dict().items()}
    report = CoRa({"budget": 0.1, "alternations": 2}).apply(host, batches())
    step = report.steps[1]
    assert step.name == "alternation"
    assert step.kept == (step.after.kl < step.before.kl)
    changed = [n for n, v in host.model.state_dict().items() if (v != before[n]).any()]
    assert bool(changed) == step.kept
    host.correct(Correction())
    assert all(torch.equal(v, before[n]) for n, v in host.model.state_dict().items())


def test_a_host_that_refuses_is_left_as_it_was():
    class Fixed(PlainHost):
        def quantize(self, weights, bits=None):
            raise CoRaError("alternations: not here")

    host = Fixed(net())
    with pytest.raises(CoRaError, match="alternations: not here"):
        CoRa({"budget": 0.2, "alternations": 2}).apply(host, batches())
    assert not host.branches
    assert not host.shifts
