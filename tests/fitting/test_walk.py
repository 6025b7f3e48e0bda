"""The walk shows each layer what it sees in both networks, those before it changed."""

import pytest
import torch
from options import forms
from plain_host import PlainHost
from small_net import batches, net
from torch import nn

from cora_plugin import CoRaConfig
from cora_plugin.adapters import Factors
from cora_plugin.adapters.operation import patches
from cora_plugin.fitting import Regression, Walk
from cora_plugin.fitting.regression import RIDGES
from cora_plugin.fitting.walk import Change
from cora_plugin.statistics.metrics import weighting


class Backwards(nn.Module):
    """Runs its layers against the order of their names, one of them twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.b = nn.Linear(6, 6)
        self.c = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(self.b(self.c(self.b(x)).relu_()))


class Watching:
    """Keeps what it is shown and answers with a fixed shift."""

    def __init__(self, layer):
        self.layer = layer
        self.shown = []
        self.shift = torch.randn(
            len(layer.weight), generator=torch.Generator().manual_seed(1)
        )

    def update(self, _, u, v):
        self.shown.append((u, v))

    def change(self, mean, other):
        self.means = mean, other
        return Change(self.shift)


def test_layers_are_visited_in_execution_order_with_changes_in_place():
    host, images = PlainHost(Backwards()), torch.randn(11, 6)
    names = {}

    def visitor(layer):
        names[layer.name] = Watching(layer)
        return names[layer.name]

    changes = Walk(host, host.layers, images, 0)(visitor)
    assert list(changes) == ["b", "c", "a"]
    a, b, c = host.float_net.a, host.float_net.b, host.float_net.c
    u = [images, c(b(images)).relu()]
    quantized = {layer.name: layer.dequantized for layer in host.layers}

    def run(name, x, shifted=True):
        layer = getattr(host.model, name)
        y = nn.functional.linear(x, quantized[name], layer.bias)
        return y + names[name].shift if shifted else y

    with torch.no_grad():
        shown = [
            torch.cat(parts, 1)[0] for parts in zip(*names["b"].shown, strict=True)
        ]
        assert torch.equal(shown[0].float(), torch.cat(u))
        # It was unknown at its first run, and c until it was known.
        second = run("c", run("b", images, False), False).relu()
        torch.testing.assert_close(shown[1].float(), torch.cat([images, second]))
        mean = torch.cat([run("b", images, False), run("b", second, False)]).mean(0)
        torch.testing.assert_close(names["b"].means[1].float(), mean)
        v = run("b", run("c", run("b", images)).relu())
        shown = [
            torch.cat(parts, 1)[0] for parts in zip(*names["a"].shown, strict=True)
        ]
        torch.testing.assert_close(shown[0].float(), b(u[1]))
        torch.testing.assert_close(shown[1].float(), v)
        mean, other = names["a"].means
        torch.testing.assert_close(mean.float(), a(b(u[1])).mean(0))
        torch.testing.assert_close(other.float(), run("a", v, False).mean(0))


def told(layer, u, v, ridge):
    """The ridge regression of the upstream error, from columns [g, p, k]."""
    rows = u.shape[1]
    u, v = u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    second, cross = v.mT @ v / rows, (u - v).mT @ v / rows
    mean = second.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damping = ridge * layer.columns / rows * mean * torch.eye(layer.columns)
    weight = layer.operation.matrices(layer.weight.double())
    return weight @ cross @ torch.linalg.inv(second + damping), second


def best_ridge(layer, u, v, images):
    """The one whose regression on half of the images misses least on the other."""
    rows = torch.arange(u.shape[1]).reshape(images, -1)
    parts = rows.tensor_split(8)
    halves = [torch.cat(parts[first::2]).flatten() for first in (0, 1)]
    weight = layer.operation.matrices(layer.weight.double())

    def missed(ridge):
        total = 0.0
        for here, there in (halves, halves[::-1]):
            found, _ = told(layer, u[:, here], v[:, here], ridge)
            error = (u - v)[:, there] @ weight.mT - v[:, there] @ found.mT
            total += error.var(1, correction=0).sum()
        return total

    return min(RIDGES, key=missed)


def regressed(layer, u, v, images, rank, config):
    """The adapter's weight by the formula, from columns [g, p, k]."""
    upstream, second = told(layer, u, v, best_ridge(layer, u, v, images))
    target = layer.residual + upstream.reshape(layer.weight.shape)
    metric = weighting(layer, second.unsqueeze(1), None, config.damping)
    factors = Factors.of(target, layer.operation, metric)
    return factors.adapter(rank, config.adapter_bits).merged().double()


@pytest.mark.parametrize("rank", [0, 3])
def test_one_pass_ends_where_a_pass_a_layer_does(rank):
    config = CoRaConfig(adapter_bits=32)
    host, images = PlainHost(net(), act_step=0.05), torch.cat(batches(3))
    terms = forms(host, {layer.name: rank for layer in host.layers})
    walk = Walk(host, host.layers, images, 0)
    adapters, shifts = Regression(walk, terms, {}, config)()
    assert len(shifts) == len(host.layers)
    assert len(adapters) == (len(host.layers) if rank else 0)
    before, earlier = {}, {}
    for layer in host.layers:
        name = layer.name
        seen = {}

        def watch(name, x, y, to=seen):
            to.setdefault(name, []).append((x, y))

        with torch.no_grad():
            with host.acting(quantized=False), host.observe(watch):
                host.run(images)
            with host.acting(before, earlier), host.observe(watch):
                host.run(images)
            (x, y), (other_x, _) = seen[name]
            columns = patches(x, layer.operation, layer.kernel, dtype=torch.float64)
            other = patches(other_x, layer.operation, layer.kernel, dtype=torch.float64)
            merged = layer.dequantized.double()
            if rank:
                found = adapters[name].merged().double()
                expected = regressed(layer, columns, other, len(images), rank, config)
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
                merged = merged + found
            # The shift makes the mean `a E[y]`, by its definition.
            weight = layer.operation.matrices(layer.weight.double()).mT
            plain = columns @ weight
            answer = other @ layer.operation.matrices(merged).mT
            centred = plain - plain.mean(1, keepdim=True)
            together = (centred * (answer - answer.mean(1, keepdim=True))).sum()
            gain = (together / centred.square().sum()).clamp(0, 1)
            over = [0, *range(2, y.ndim)]
            bias = y.double().mean(over) - plain.mean(1).flatten()
            wanted = gain * y.double().mean(over) - answer.mean(1).flatten() - bias
        torch.testing.assert_close(shifts[name].double(), wanted, atol=1e-5, rtol=1e-3)
        before[name] = merged.to(layer.weight)
        earlier[name] = shifts[name]


def test_the_quantized_network_runs_once():
    host, ran = PlainHost(net()), []
    images = torch.cat(batches(2))
    walk = Walk(host, host.layers, images, 16)
    host.model[0].register_forward_hook(lambda *_: ran.append("quantized"))
    host.float_net[0].register_forward_hook(lambda *_: ran.append("float"))
    Regression(walk, {}, {}, CoRaConfig())()
    assert ran == ["quantized"]
