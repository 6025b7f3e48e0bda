"""For authors of hosts: the tests that a host must pass, and a net to run them on.

It needs pytest. A test module of a toolkit's host is a subclass:

>>> class TestMyToolkit(HostContract):
...     def quantized(self, net, batches): ...
...     def host_of(self, model, batches): ...
"""

from cora_plugin.testing.contract import HostContract
from cora_plugin.testing.kinds import KINDS, net_of
from cora_plugin.testing.net import LAYERS, Net, images, trained

__all__ = ["KINDS", "LAYERS", "HostContract", "Net", "images", "net_of", "trained"]
