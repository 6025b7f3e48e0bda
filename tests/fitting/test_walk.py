"""The walk shows each layer what it sees in the float and the quantized network."""

import torch
from plain_host import PlainHost
from small_net import batches, net
from torch import nn

from cora_plugin.fitting import Walk


class Backwards(nn.Module):
    """Runs its layers against the order of their names, one of them twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        return self.a(self.b(self.b(x).relu()))


def test_layers_come_in_execution_order():
    host = PlainHost(Backwards())
    walk = Walk(host, host.layers, [torch.randn(5, 6)])
    assert [layer.name for layer in walk] == ["b", "a"]


def test_each_run_of_a_layer_is_shown_with_changes_in_place():
    host, images = PlainHost(Backwards()), torch.randn(5, 6)
    b = host.layers[1]
    shift = torch.randn(6)
    (first, second) = Walk(host, host.layers, [images]).pairs(
        b, {"b": b.weight}, {"b": shift}
    )
    plain = host.float_net.b
    with torch.no_grad():
        assert torch.equal(first.float_input, images)
        assert torch.equal(first.float_output, plain(images))
        assert torch.equal(first.input, images)
        torch.testing.assert_close(first.output, plain(images) + shift)
        torch.testing.assert_close(second.input, (plain(images) + shift).relu())
        assert torch.equal(second.float_input, plain(images).relu())


def test_what_follows_a_layer_is_not_run():
    host, data = PlainHost(net()), batches(2)
    ran = []
    host.model[10].register_forward_hook(lambda *_: ran.append(True))
    walk = Walk(host, host.layers, data)
    ran.clear()
    pairs = list(walk.pairs(host.layers[1], {}, {}))
    assert len(pairs) == 2
    assert not ran
