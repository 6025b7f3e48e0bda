"""Both hosts count the same transitions on the same weights."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from cora_plugin.qat import hosted
from cora_plugin.qat.transitions import Transitions

pytestmark = pytest.mark.skipif(
    not (find_spec("brevitas") and find_spec("nncf")), reason="needs both toolkits"
)


def test_same_weights_same_transitions(float_net, quantize, batches):
    from cora_plugin.integrations.brevitas import BrevitasHost
    from cora_plugin.integrations.nncf import quantize_ptq

    # NNCF's own range: from -7 to 7, not from -8.
    ours = quantize(weight_narrow_range=True, bias_bits=None)
    net = copy.deepcopy(float_net)
    for layer in BrevitasHost(ours).layers:  # equalized, batch norms merged
        net.get_submodule(layer.name).weight.data.copy_(layer.weight)
    net.stem_bn = net.depthwise_bn = nn.Identity()
    theirs = quantize_ptq(
        net, batches, depthwise_bits=None, first_last_bits=None, weight_quantile=None
    )
    with hosted(ours).training() as one, hosted(theirs).training() as two:
        # Brevitas gives its first layer 8 bits.
        counted = [
            Transitions([each for each in some if each.name != "stem"], window=4)
            for some in (one, two)
        ]
        for each in counted:
            each.begin()
        for seed in range(4):
            for each in counted:
                random = torch.Generator().manual_seed(seed)
                with torch.no_grad():
                    for latent in each.latents:
                        noise = torch.randn(latent.weight.shape, generator=random)
                        latent.weight.add_(0.02 * latent.weight.abs().max() * noise)
            first, second = (each.count() for each in counted)
            assert sum(first) > 50
            # A weight midway between two codes may become either.
            assert sum(abs(a - b) for a, b in zip(first, second, strict=True)) <= 2
        assert sum(counted[0].oscillating()) > 10
        for a, b in zip(*(e.oscillating() for e in counted), strict=True):
            assert abs(a - b) <= 2
