"""Bias correction after the adapters: what they leave of a layer's mean error.

NNCF's own runs before there are adapters; together they would correct the mean twice.
Here a layer's output is shifted by `(W − Wq − BA) E[u]`, u its unfolded input. The
shift is a hook of its own, so it matters not whether a bias exists or a batch norm
follows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from cora_plugin.adapters.operation import patches
from cora_plugin.divergence import Divergence, divergence, outputs
from cora_plugin.integrations.nncf.host import NNCFHost
from cora_plugin.integrations.nncf.insert import CoRaShift, adapted, remove_hooks
from cora_plugin.layer import Observer, QuantizedLayer
from cora_plugin.report import Step


class MeanInputs:
    """Running means of layers' unfolded inputs `E[u]`, [g, k] in float64."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images: dict[str, int] = {}

    @torch.no_grad()
    def update(self, layer: QuantizedLayer, x: Tensor) -> None:
        """Add a batch of a layer's quantized inputs, [N, n, *size] or [N, …, n]."""
        # Unfolding is linear, so one mean image does for the whole batch.
        rows = patches(x.mean(0, keepdim=True), layer.operation, layer.kernel)
        mean = rows.double().mean(1)  # [g, k]
        images = len(x)
        self._sums[layer.name] = self._sums.get(layer.name, 0) + images * mean
        self._images[layer.name] = self._images.get(layer.name, 0) + images

    def means(self) -> dict[str, Tensor]:
        """The means by layer."""
        return {name: s / self._images[name] for name, s in self._sums.items()}


class ObservedHost(NNCFHost):
    """A host that keeps the mean inputs of its layers while calibration runs."""

    @cached_property
    def inputs(self) -> MeanInputs:
        """The means so far."""
        return MeanInputs()

    @contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Report every run of a layer."""
        layers = self.reading.layers

        def both(name: str, x: Tensor, y: Tensor) -> None:
            if not torch.is_grad_enabled():  # The backward pass runs the float model.
                self.inputs.update(layers[name], x)
            observer(name, x, y)

        with super().observe(both):
            yield


def correct_biases(
    host: NNCFHost, means: Mapping[str, Tensor], held_out: Sequence[Tensor]
) -> list[Step]:
    """Correct the biases of a model with adapters; each step is kept if it helps.

    Where a reference has other biases than the model, which NNCF has corrected, they
    are put back first.

    Args:
        host: The model, prepared.
        means: `E[u]` by layer.
        held_out: Images that judge, in batches.
    """
    with host.float_model():
        reference = outputs(host, held_out)
    now = divergence(reference, outputs(host, held_out))
    steps = []
    restored = {
        name: value
        for name, value in host.moved.items()
        if not name.endswith(".weight") and value.ndim == 1
    }
    if restored:
        parameters = dict(host.model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in restored}
        _assign(host, restored)
        steps.append(_judge("float biases", now, host, reference, held_out))
        if steps[-1].kept:
            now = steps[-1].after
        else:
            _assign(host, before)
    host.shift(_shifts(host, means))
    steps.append(_judge("bias correction", now, host, reference, held_out))
    if not steps[-1].kept:
        remove_hooks(host.model, (CoRaShift,))
    return steps


def _shifts(host: NNCFHost, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    carried = adapted(host.model)
    found = {}
    for layer in host.layers:
        if layer.name not in means:
            continue
        left = layer.residual
        if layer.name in carried:
            left = left - carried[layer.name].adapter.merged().double()
        matrices = layer.operation.matrices(left)  # [g, m/g, k]
        shift = matrices @ means[layer.name].unsqueeze(-1)  # [g, m/g, 1]
        found[layer.name] = shift.reshape(-1).to(layer.weight.dtype)
    return found


def _judge(
    name: str,
    before: Divergence,
    host: NNCFHost,
    reference: Tensor,
    held_out: Sequence[Tensor],
) -> Step:
    after = divergence(reference, outputs(host, held_out))
    return Step(name, before, after, after.kl < before.kl)


@torch.no_grad()
def _assign(host: NNCFHost, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        host.model.get_parameter(name).copy_(value)
