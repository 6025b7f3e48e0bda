"""The core's own plain host keeps the contract, too, as the documents' example asks."""

import re
from pathlib import Path

from plain_host import PlainHost, load_correction, quantized_copy, read_correction

from cora_plugin import load_adapters, save_adapters

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-host.md"


class Acme:
    """What the example calls its toolkit."""

    @staticmethod
    def quantize(net, batches):
        return quantized_copy(net, bits=4)

    @staticmethod
    def save_cora(path, model):
        correction = read_correction(model)
        save_adapters(path, correction.adapters, correction.shifts)

    @staticmethod
    def load_cora(path, model):
        adapters, shifts, _ = load_adapters(path)
        load_correction(model, adapters, shifts)


NAMES = {"acme": Acme, "AcmeHost": PlainHost}
(EXAMPLE,) = re.findall(r"(?s)```python\n(.*?)```", PAGE.read_text(encoding="utf-8"))
exec(compile(EXAMPLE, str(PAGE), "exec"), NAMES)


class TestPlain(NAMES["TestAcme"]):
    """A host without a toolkit."""

    def test_refuses_a_float_model(self, float_net, batches):
        """It quantizes one itself."""
        host = PlainHost(float_net)
        assert host.layers
