"""Finds the host of a quantized model that is to be trained."""

import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cora_plugin.adapters.errors import ModelError
from cora_plugin.host import TrainableHost
from cora_plugin.integrations.toolkit import load_toolkit, toolkits


def hosted(model: nn.Module | TrainableHost, example: Any = None) -> TrainableHost:
    """The host of a model that a toolkit quantized, with adapters or without.

    Only toolkits that are imported already are asked: no other can have made it.

    Args:
        model: The model, or a host, which is returned.
        example: An input, for toolkits that have to trace the model.

    Raises:
        ModelError: No toolkit knows the model.
    """
    if not isinstance(model, nn.Module):
        return model
    inner = _unwrapped(model)
    for name in toolkits():
        if name not in sys.modules and not name.startswith("cora"):
            continue
        host = load_toolkit(name).trainable(inner, example)
        if host is not None:
            return host
    raise ModelError(
        f"the model ({type(model).__qualname__}) was quantized by no toolkit that can "
        f"train ({', '.join(toolkits())}); pass what the toolkit returned, or its host"
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside data-parallel wrappers and that of `torch.compile`."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner  # The attribute is what torch's own documents name.
        else:
            return model
