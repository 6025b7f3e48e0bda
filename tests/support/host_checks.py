"""What the tests of every host do with the small net of integrations/conftest.py."""

import torch

from cora_plugin.adapters import Adapter, Kind, QuantizedTensor, truncate
from cora_plugin.adapters.factor import Weighting

LAYERS = ["stem", "reflect", "depthwise", "pointwise", "same", "dilated", "head"]


@torch.no_grad()
def run(model, x):
    """A toolkit's output as a plain tensor."""
    y = model(x)
    return getattr(y, "value", y)


def kl(reference, output):
    p, q = reference.log_softmax(1), output.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def assert_same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def float_weights(host):
    """Float weights for every layer, activations quantized."""
    return host.weights({layer.name: layer.weight for layer in host.layers})


def whole(host):
    """Adapters that keep every residual whole, in float."""
    return {
        layer.name: Adapter(
            Kind.FULL,
            layer.full_rank,
            QuantizedTensor(layer.residual.float(), None, 32),
            None,
            tuple(layer.weight.shape),
            layer.operation.groups,
        )
        for layer in host.layers
    }


def factored(host):
    """Adapters of two factors of full rank, in float."""
    made = {}
    for layer in host.layers:
        shape, rank = tuple(layer.weight.shape), layer.full_rank
        a, b = truncate(layer.matrices, rank, Weighting())
        if layer.depthwise:
            kind, a, b = Kind.SHARED_BASIS, a[0], b[0]
        else:
            kind = Kind.LOW_RANK
            a = a.reshape(-1, *shape[1:])
            b = b.reshape(shape[0], rank, *[1] * layer.operation.dimensions)
        stored = (QuantizedTensor(t.float(), None, 32) for t in (a, b))
        groups = layer.operation.groups
        made[layer.name] = Adapter(kind, rank, *stored, shape, groups)
    return made
