"""Nets of tokens: embeddings, attention, norms and linear layers of rank 3."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional

from cora_plugin.integrations.toolkit import load_toolkit

HOSTS = [host for host in ("brevitas", "nncf") if find_spec(host)]
CONFIG = {"budget": 0.1, "objective": "kl", "axis": -1}


class Words(nn.Module):
    """[N, T] int64 to logits [N, T, 20]; attention by torch's layer or by hand."""

    def __init__(self, own):
        super().__init__()
        torch.manual_seed(0)
        self.own = own
        self.embedding = nn.Embedding(20, 24)
        self.near = nn.Conv1d(24, 24, 3, padding=1)
        self.norm = nn.LayerNorm(24)
        if own:
            self.qkv, self.mix = nn.Linear(24, 72), nn.Linear(24, 24)
        else:
            self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 20)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(x + self.near(x.transpose(1, 2)).transpose(1, 2).relu())
        if self.own:
            n, t, width = x.shape
            heads = self.qkv(x).view(n, t, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            q, k, v = heads.unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v)
            x = x + self.mix(y.transpose(1, 2).reshape(n, t, width))
        else:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return 10 * self.head(x)


@pytest.mark.parametrize("own", [True, False], ids=["by hand", "MultiheadAttention"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_net_of_tokens_is_served_whole(host, own):
    torch.manual_seed(1)
    data = [torch.randint(0, 20, (8, 12)) for _ in range(6)]
    net, toolkit = Words(own).eval(), load_toolkit(host)
    with torch.no_grad():
        expected = net(data[0])
    quantized = toolkit.quantize(
        net, [(x, 0) for x in data], toolkit.options(act_range="mse")
    )
    report = toolkit.adapt(quantized.copied(), CONFIG)
    if host == "nncf":  # Norms at 4 bits would make it 0.1.
        assert report.before.value < 0.02
    assert report.after.value < 0.6 * report.before.value
    assert {*report.skipped} <= {"embedding", "norm"}
    names = {layer.name.split("/")[0].split(".")[0] for layer in report.layers}
    assert names == {"near", "head"} | ({"qkv", "mix"} if own else {"attention"})
    corrected = toolkit.correct_biases(quantized)
    with torch.no_grad():
        error = corrected.model(data[0]) - expected
        assert 0 < error.square().mean() < 0.1 * expected.square().mean()
