"""What every host owes the algorithm; the toolkits that are installed are tested."""

import copy
from importlib.util import find_spec

import pytest
import torch
from any_net import quantized
from torch import nn

from cora_plugin.adapters import make_adapter, truncate
from cora_plugin.adapters.factor import Weighting
from cora_plugin.testing import HostContract


def brevitas_host(model, batches):
    from cora_plugin.integrations.brevitas import BrevitasHost

    return BrevitasHost(model)


def nncf_host(model, batches):
    from cora_plugin.integrations.nncf import NNCFHost

    return NNCFHost(model, batches[0][0])


def nncf_quantize(net, batches):
    from cora_plugin.integrations.nncf import quantize_ptq

    return quantize_ptq(
        net, batches, depthwise_bits=None, first_last_bits=None, weight_quantile=None
    )


@pytest.fixture(scope="module")
def brevitas_prototype(quantize):
    return quantize("layerwise", bias_bits=None)


if find_spec("brevitas"):

    class TestBrevitas(HostContract):
        """Brevitas keeps this contract."""

        requantizes = True
        bits = frozenset({4, 8})  # 8 at the first layer

        @pytest.fixture
        def prototype(self, brevitas_prototype):
            return brevitas_prototype

        def quantized(self, net, batches):
            return quantized("brevitas", net, [x for x, _ in batches])

        def host_of(self, model, batches):
            return brevitas_host(model, batches)

        @torch.no_grad()
        def answer(self, model, x):
            y = model(x)
            return getattr(y, "value", y)

        def apply(self, batches, model):
            from cora_plugin.integrations.brevitas import apply_cora

            return apply_cora(batches, model, "budget=0.3")

        def save(self, path, model):
            from cora_plugin.integrations.brevitas import save_cora

            save_cora(path, model)

        def load(self, path, model, batches):
            from cora_plugin.integrations.brevitas import load_cora

            load_cora(path, model)


if find_spec("nncf"):

    class TestNNCF(HostContract):
        """NNCF keeps this contract."""

        unsupported = frozenset({"depthwise conv1d"})  # left in float

        def quantized(self, net, batches):
            return nncf_quantize(net, batches)

        def host_of(self, model, batches):
            return nncf_host(model, batches)

        def apply(self, batches, model):
            from cora_plugin.integrations.nncf import apply_cora

            return apply_cora(model, batches, "budget=0.3")

        def save(self, path, model):
            from cora_plugin.integrations.nncf import save_cora

            save_cora(path, model)

        def load(self, path, model, batches):
            from cora_plugin.integrations.nncf import load_cora

            load_cora(path, model, batches[0][0])


if find_spec("brevitas") and find_spec("nncf"):

    def test_hosts_agree(float_net, quantize, batches):
        """Same weights, same quantizers: same W, Wq and adapters."""
        # NNCF's own range: from -7 to 7, not from -8.
        brevitas = brevitas_host(quantize(weight_narrow_range=True), batches)
        net = copy.deepcopy(float_net)
        for layer in brevitas.layers:  # equalized, batch norms merged
            net.get_submodule(layer.name).weight.data.copy_(layer.weight)
        net.stem_bn = net.depthwise_bn = nn.Identity()
        nncf = nncf_host(nncf_quantize(net, batches), batches)
        pairs = list(zip(brevitas.layers, nncf.layers, strict=True))
        for one, other in pairs[1:]:  # Brevitas gives its first layer 8 bits
            assert one.name == other.name
            assert one.weight_bits == other.weight_bits
            assert one.scale_bits == other.scale_bits
            torch.testing.assert_close(one.weight, other.weight)
            torch.testing.assert_close(one.dequantized, other.dequantized)
            factors = [truncate(e.matrices, 2, Weighting()) for e in (one, other)]
            ours, theirs = (b @ a for a, b in factors)
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
            # W and Wq agree to the last bit or two, so that a factor's entry midway
            # between two integers may become the one here and the other there.
            made = [
                make_adapter(e.residual, e.operation, 2, Weighting(), 8, e.name)
                for e in (one, other)
            ]
            assert made[0].stored_bits == made[1].stored_bits
            stored = (adapter.tensors.items() for adapter in made)
            for (key, ours), (_, theirs) in zip(*stored, strict=True):
                torch.testing.assert_close(ours.scale, theirs.scale)
                # Both factors of a rank may change their sign.
                apart = ours.values.int().abs() - theirs.values.int().abs()
                assert apart.abs().max() <= 1, (one.name, key)
                assert apart.abs().sum() <= 2, (one.name, key)
            x = torch.randn(2, 32, 8, 8)[
                :, : one.weight.shape[1] * one.operation.groups
            ]
            if one.operation.dimensions and one.name != "reflect":
                ours, theirs = (e.operation(x, e.weight) for e in (one, other))
                torch.testing.assert_close(ours, theirs)
