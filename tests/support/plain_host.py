"""A host without a toolkit: plain torch, weights rounded a channel.

Everything that a model knows of its quantization hangs on its layers, so that copies of
the model know it too: `layer.plain`.
"""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from cora_plugin.adapters import Adapter, Branch, Operation
from cora_plugin.adapters.errors import ModelError
from cora_plugin.adapters.quantized import quantize
from cora_plugin.integrations.host import check_fit, refuse_carriers, replace_correction
from cora_plugin.integrations.provenance import check_made_for, fingerprints
from cora_plugin.integrations.scopes import evaluation, without_gradients
from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.outputs import run

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass
class Mode:
    """What all layers of a model do just now."""

    quantized: bool = True
    corrected: bool = True
    shifts: dict = field(default_factory=dict)


@dataclass
class Plain:
    """How one layer was quantized, and what stands beside it."""

    name: str
    weight: torch.Tensor
    bits: int
    act_step: float | None
    mode: Mode
    adapter: Adapter | None = None
    branch: Branch | None = None
    shift: torch.Tensor | None = None
    replaced: torch.Tensor | None = None


def operation_of(layer):
    if isinstance(layer, nn.Linear):
        return Operation()
    sides = layer.padding
    if sides != "same":
        sides = tuple((side, side) for side in sides)
    return Operation(
        layer.weight.ndim - 2,
        layer.stride,
        sides,
        layer.padding_mode,
        layer.dilation,
        layer.groups,
        layer.transposed,
        layer.output_padding if layer.transposed else (),
    )


def quantized_copy(net, bits=3, act_step=None):
    """A copy whose convolutions and linear layers have rounded weights."""
    model, mode = copy.deepcopy(net).eval(), Mode()
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            layout = operation_of(layer).layout
            weight = layout(layer.weight.detach().clone())
            layer.plain = Plain(name, weight, bits, act_step, mode)
            layer.weight.data = layout(quantize(weight, bits).dequantize().to(weight))
            layer.register_forward_pre_hook(_round_input)
            layer.register_forward_hook(_correct_output)
    return model


def _round_input(layer, inputs):
    step = layer.plain.act_step
    if step is None or not layer.plain.mode.quantized:
        return inputs
    return ((inputs[0] / step).round() * step,)


def _correct_output(layer, inputs, output):
    plain, ones = layer.plain, [1] * operation_of(layer).dimensions
    shifts = [plain.mode.shifts.get(plain.name)]
    if plain.mode.corrected:
        shifts.append(plain.shift)
        if plain.branch is not None:
            output = output + plain.branch(inputs[0])
    for shift in shifts:
        if shift is not None:
            output = output + shift.view(-1, *ones)
    return output


class PlainHost:
    """Fulfils `cora_plugin.host.Host` for a net, or for what `quantized_copy` made.

    A net is quantized first; `float_net` is the float one.
    """

    def __init__(self, net, bits=3, act_step=None):
        if not any(hasattr(layer, "plain") for layer in net.modules()):
            net = quantized_copy(net, bits, act_step)
        self.model = net
        refuse_carriers(
            name for name, e in self._plain.items() if e.branch or e.shift is not None
        )
        self.skipped = {}
        self.layers = []
        self.given = {}
        for name, plain in self._plain.items():
            layer = net.get_submodule(name)
            self.layers.append(
                QuantizedLayer(
                    name,
                    plain.weight,
                    operation_of(layer).layout(layer.weight.detach().clone()),
                    operation_of(layer),
                    plain.bits,
                    32 * len(plain.weight),
                )
            )
        self.float_net = copy.deepcopy(net).requires_grad_(False)
        for name, plain in self._plain.items():
            layer = self.float_net.get_submodule(name)
            layer.weight.data = operation_of(layer).layout(plain.weight)
            layer._forward_hooks.clear()
            layer._forward_pre_hooks.clear()
        self._made_for = fingerprints(self.layers)
        self._standing = Correction()

    @property
    def _plain(self):
        return {
            name: layer.plain
            for name, layer in self.model.named_modules()
            if hasattr(layer, "plain")
        }

    @property
    def _mode(self):
        return next(iter(self._plain.values())).mode

    @property
    def is_float(self):
        return not self._mode.quantized

    @property
    def branches(self):
        return {name: e.branch for name, e in self._plain.items() if e.branch}

    @property
    def shifts(self):
        plain = self._plain.items()
        return {name: e.shift for name, e in plain if e.shift is not None}

    @contextmanager
    def prepared(self):
        with evaluation(self.model), without_gradients(self.model):
            yield

    def run(self, batch):
        if not self.given:
            return run(self.model, batch)
        given = {
            f"{name}.weight": self._layout(name)(value)
            for name, value in self.given.items()
        }

        def call(*args, **kwargs):
            return torch.func.functional_call(self.model, given, args, kwargs)

        call.parameters = self.model.parameters
        return run(call, batch)

    @contextmanager
    def acting(self, weights=None, shifts=None, quantized=True):
        mode, before, given = self._mode, copy.copy(self._mode), self.given
        floats = {} if quantized else {n: e.weight for n, e in self._plain.items()}
        main = {e.name: e.dequantized for e in self.layers} if quantized else floats
        self.given = {**main, **(weights or {})}
        mode.quantized, mode.corrected = quantized, False
        mode.shifts = dict(shifts or {})
        try:
            yield
        finally:
            vars(mode).update(vars(before))
            self.given = given

    @contextmanager
    def observe(self, observer):
        with ExitStack() as stack:
            for layer in self.layers:

                def hook(_, inputs, output, name=layer.name):
                    observer(name, inputs[0], output)

                module = self.model.get_submodule(layer.name)
                # Behind the rounding of inputs, in front of what corrects outputs.
                handle = module.register_forward_hook(hook)
                stack.callback(handle.remove)
            yield

    def quantize(self, weights, bits=None):
        bits = bits or {}
        return {
            name: quantize(value, bits.get(name, self._plain[name].bits))
            .dequantize()
            .to(value)
            for name, value in weights.items()
        }

    def correct(self, correction):
        self._standing = replace_correction(
            self._standing, correction, self._made_for, self._insert, self._remove
        )

    def _insert(self, correction):
        names = {*correction.adapters, *correction.shifts, *correction.weights}
        layers = {layer.name: layer for layer in self.layers}
        for name in names:
            layer = layers.get(name)
            check_fit(
                name,
                layer and layer.weight,
                layer.operation.groups if layer else 1,
                correction.adapters.get(name),
                correction.shifts.get(name),
            )
        for name, adapter in correction.adapters.items():
            self._plain[name].adapter = adapter
            branch = Branch(adapter, layers[name].operation)
            self._plain[name].branch = branch.to(layers[name].weight.device)
        for name, shift in correction.shifts.items():
            self._plain[name].shift = shift
        for name, value in self.quantize(correction.weights).items():
            layer = self.model.get_submodule(name)
            self._plain[name].replaced = layer.weight.data
            layer.weight.data = self._layout(name)(value)

    def _layout(self, name):
        return operation_of(self.model.get_submodule(name)).layout

    def _remove(self):
        for name, plain in self._plain.items():
            if plain.replaced is not None:
                self.model.get_submodule(name).weight.data = plain.replaced
            plain.adapter = plain.branch = plain.shift = plain.replaced = None


def read_correction(model):
    """The adapters and shifts that a model carries."""
    plain = [e.plain for e in model.modules() if hasattr(e, "plain")]
    adapters = {e.name: e.adapter for e in plain if e.adapter}
    return Correction(adapters, {e.name: e.shift for e in plain if e.shift is not None})


def load_correction(model, adapters, shifts):
    """Put a file's adapters into a model, if they were made for it."""
    host = PlainHost(model)
    weights = {e.name: (e.dequantized, e.weight_bits, e.operation) for e in host.layers}
    check_made_for(adapters, weights)
    for name, shift in shifts.items():
        if name not in weights or len(shift) != len(weights[name][0]):
            raise ModelError(f"{name}: no layer has {len(shift)} outputs to correct")
    host.correct(Correction(adapters, shifts))
