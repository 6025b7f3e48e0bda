"""A tiny net on both hosts, quantized, and how it is given adapters."""

import pytest
import torch
from torch import nn

CONFIG = {"budget": 0.3, "held_out": 0.25, "sensitivity_images": 4}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        return self.layers(x)


def net():
    torch.manual_seed(0)
    return Net().eval()


def data():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=random) for _ in range(3)]


class Hosted:
    """A host; called, it quantizes a net and says how adapters are put into it."""

    def __init__(self, name):
        self.__name__ = name  # That of the test.

    def __call__(self, net, batches):
        model = self.quantized(net, batches)
        return model, lambda model: self.apply(model, batches, CONFIG)

    @property
    def functions(self):
        pytest.importorskip(self.__name__)
        import importlib

        return importlib.import_module(f"cora_plugin.integrations.{self.__name__}")

    def quantized(self, net, batches, **options):
        return self.functions.quantize_ptq(net, batches, weight_bits=3, **options)

    def apply(self, model, batches, config=None):
        first, second = self.ordered(model, batches)
        return self.functions.apply_cora(first, second, config)

    def ordered(self, model, batches):
        """Model and data in the order of the toolkit's own functions."""
        pair = (model, batches)
        return pair if self.__name__ == "nncf" else pair[::-1]

    def save(self, path, model):
        self.functions.save_cora(path, model)

    def load(self, path, model, example):
        more = (example,) if self.__name__ == "nncf" else ()
        self.functions.load_cora(path, model, *more)


HOSTS = (Hosted("brevitas"), Hosted("nncf"))
