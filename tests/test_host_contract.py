"""The core's own plain host keeps the contract, too."""

from plain_host import PlainHost, load_correction, quantized_copy, read_correction

from cora_plugin import load_adapters, save_adapters
from cora_plugin.testing import HostContract


class TestPlain(HostContract):
    """A host without a toolkit."""

    requantizes = True

    def quantized(self, net, batches):
        return quantized_copy(net, bits=4)

    def host_of(self, model, batches):
        return PlainHost(model)

    def save(self, path, model):
        correction = read_correction(model)
        save_adapters(path, correction.adapters, correction.shifts)

    def load(self, path, model, batches):
        adapters, shifts, _ = load_adapters(path)
        load_correction(model, adapters, shifts)

    def test_refuses_a_float_model(self, float_net, batches):
        """It quantizes one itself."""
        host = PlainHost(float_net)
        assert host.layers
