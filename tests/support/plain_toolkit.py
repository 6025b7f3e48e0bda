"""A toolkit of another package: the core's plain host behind an entry point."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from plain_host import PlainHost, quantized_copy
from torch import nn

from cora_plugin import CoRa
from cora_plugin.integrations.toolkit import (
    Export,
    Options,
    Quantized,
    Toolkit,
    option,
)


@dataclass(frozen=True, kw_only=True)
class PlainOptions(Options):
    coarse: bool = option(False, "two bits, whatever is asked for")


@dataclass(frozen=True)
class WeightOptions:
    half: bool = False


def write_weights(model, example, path, half=False):
    state = model.state_dict()
    torch.save({n: v.half() if half else v for n, v in state.items()}, path)


class PlainToolkit(Toolkit[PlainOptions]):
    name = "plain"
    title = "Plain torch"
    options = PlainOptions
    exports: Mapping = {"weights": Export(write_weights, ".weights", WeightOptions)}
    recipes: Mapping = {"ptq": {}, "coarse": {"coarse": True}}
    corrects_afterwards = False

    def quantize(self, net, loader, options):
        bits = 2 if options.coarse else options.weight_bits
        return Quantized(quantized_copy(net, bits), net, loader, options)

    @torch.no_grad()
    def correct_biases(self, quantized):
        """Move the last layer's bias by the mean error of the outputs."""
        model = quantized.copied().model
        images = torch.cat([batch[0] for batch in quantized.loader])
        error = (quantized.net(images) - model(images)).mean(0)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        layers[-1].bias += error
        return replace(quantized, model=model)

    def adapt(self, quantized, config, plan=None):
        return CoRa(config).apply(PlainHost(quantized.model), quantized.loader, plan)

    def host(self, model, example, reference=None):
        return PlainHost(model)

    @torch.no_grad()
    def outputs(self, model, images):
        return model(images)


TOOLKIT = PlainToolkit()
