"""A host without a toolkit: plain torch, weights rounded a channel."""

import copy
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from cora_plugin.adapters import Branch, Operation
from cora_plugin.adapters.quantized import quantize
from cora_plugin.layer import QuantizedLayer


def operation_of(layer):
    if isinstance(layer, nn.Linear):
        return Operation()
    sides = tuple((side, side) for side in layer.padding)
    return Operation(2, layer.stride, sides, "zeros", layer.dilation, layer.groups)


class PlainHost:
    def __init__(self, net, bits=3, act_step=None):
        self.model = copy.deepcopy(net).eval()
        self.float_net = copy.deepcopy(net).eval()
        self.skipped = {}
        self.layers = []
        self.bits = bits
        self.biases_changed = False
        self.branches = {}
        self.shifts = {}
        self.is_float = False
        self.given = {}
        self.given_shifts = {}
        self.own = {}
        for name, layer in self.model.named_modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            stored = quantize(layer.weight.detach(), bits)
            self.layers.append(
                QuantizedLayer(
                    name,
                    layer.weight.detach().clone(),
                    stored.dequantize(),
                    operation_of(layer),
                    bits,
                    32 * len(layer.weight),
                )
            )
            layer.weight.data = stored.dequantize()
            if act_step is not None:
                layer.register_forward_pre_hook(
                    lambda _, inputs: ((inputs[0] / act_step).round() * act_step,)
                )
            layer.register_forward_hook(self._add(name))

    def _add(self, name):
        def hook(_, inputs, output):
            branch, ones = self.branches.get(name), [1] * (output.ndim - 2)
            if branch is not None:
                output = output + branch(inputs[0])
            for shifts in (self.shifts, self.given_shifts):
                if name in shifts:
                    output = output + shifts[name].view(-1, *ones)
            return output

        return hook

    @contextmanager
    def prepared(self):
        yield

    def run(self, images):
        if self.is_float:
            return self.float_net(images)
        return torch.func.functional_call(self.model, self.given, images)

    @contextmanager
    def float_model(self):
        self.is_float = True
        try:
            yield
        finally:
            self.is_float = False

    @contextmanager
    def weights(self, values, shifts=None):
        self.given = {f"{name}.weight": value for name, value in values.items()}
        self.given_shifts = dict(shifts or {})
        try:
            yield
        finally:
            self.given, self.given_shifts = {}, {}

    @contextmanager
    def observe(self, observer):
        net = self.float_net if self.is_float else self.model
        with ExitStack() as stack:
            for layer in self.layers:

                def hook(_, inputs, output, name=layer.name):
                    observer(name, inputs[0], output)

                module = net.get_submodule(layer.name)
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    def requantize(self, values):
        return {
            n: quantize(value, self.bits).dequantize() for n, value in values.items()
        }

    def insert(self, correction):
        by_name = {layer.name: layer for layer in self.layers}
        self.branches = {
            name: Branch(adapter, by_name[name].operation)
            for name, adapter in correction.adapters.items()
        }
        self.shifts = dict(correction.shifts)
        for name, value in self.requantize(correction.weights).items():
            layer = self.model.get_submodule(name)
            self.own[name] = layer.weight.data
            layer.weight.data = value

    def remove(self):
        self.branches, self.shifts = {}, {}
        for name, value in self.own.items():
            self.model.get_submodule(name).weight.data = value
        self.own = {}
