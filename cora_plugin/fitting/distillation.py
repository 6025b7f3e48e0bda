"""Refines adapters and biases by distillation to the float model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import ModelError
from cora_plugin.batches import Units
from cora_plugin.config import RefineConfig
from cora_plugin.host import Host
from cora_plugin.layer import Correction, QuantizedLayer
from cora_plugin.objective import Distance, Objective
from cora_plugin.reference import References
from cora_plugin.teacher import Teacher
from cora_plugin.training import Group, averaged, descend, relative_groups, shuffled

Trial = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Distance]
"""`trial(weights, shifts)` gives the distance on the held-out images."""


class Trained:
    """One layer's adapter and shift as parameters, quantized whenever they run.

    Gradients pass straight through the rounding (Bengio et al., arXiv 1308.3432), so
    the adapter that is stored is the one that was trained.
    """

    def __init__(
        self, layer: QuantizedLayer, adapter: Adapter | None, shift: Tensor | None
    ) -> None:
        self._layer = layer
        self._adapter = adapter
        tensors = {} if adapter is None else adapter.tensors
        like = layer.dequantized
        self.factors = {
            name: stored.dequantize().to(like.device, copy=True).requires_grad_()
            for name, stored in tensors.items()
        }
        zero = torch.zeros(len(like), dtype=like.dtype, device=like.device)
        self.shift = (zero if shift is None else shift.clone()).requires_grad_()

    def weight(self) -> Tensor:
        """`Wq + BA`, [m, n/g, *kernel]."""
        layer, adapter = self._layer, self._adapter
        if adapter is None:
            return layer.dequantized
        stored = _requantized(adapter, self.factors).tensors
        factors = {}
        for name, factor in self.factors.items():
            with torch.no_grad():
                lost = stored[name].dequantize().to(factor.device) - factor
            factors[name] = factor + lost
        return layer.dequantized + adapter.product(factors)

    @torch.no_grad()
    def adapter(self) -> Adapter | None:
        """The adapter as it is now."""
        if self._adapter is None:
            return None
        return _requantized(self._adapter, self.factors)


def _requantized(adapter: Adapter, values: Mapping[str, Tensor]) -> Adapter:
    """An adapter of the same forms that holds other values."""
    detached = {name: value.detach() for name, value in values.items()}
    return Adapter.of(adapter.forms, detached, adapter.fingerprint)


@dataclass(frozen=True)
class Fitted:
    """The best correction found, and how many iterations and images it took."""

    correction: Correction
    iterations: int
    images: int


class Distillation:
    """A few steps of Adam on adapters and biases; the main weights stay the host's.

    Args:
        config: The settings.
        seed: Seeds the order of the images.
        host: The prepared host, without a correction in it.
        layers: The layers, with the main weights that stand.
        images: Images to learn on, in pieces that run together or alone.
        objective: What "near to the float model" means.
        trial: Measures a state on the held-out images.
        teacher: As for `References`.
    """

    def __init__(
        self,
        config: RefineConfig,
        seed: int,
        host: Host,
        layers: Sequence[QuantizedLayer],
        images: Units,
        objective: Objective,
        trial: Trial,
        teacher: Teacher | None = None,
    ) -> None:
        self._config = config
        self._seed = seed
        self._host = host
        self._layers = layers
        self._images = images
        self._references = References(host, images, teacher)
        self._objective = objective
        self._trial = trial

    def __call__(self, correction: Correction) -> Fitted:
        """Refine a correction; returns the best state on the held-out images.

        Raises:
            CoRaError: The loss is no longer finite.
        """
        config = self._config
        trained = {
            layer.name: Trained(
                layer,
                correction.adapters.get(layer.name),
                correction.shifts.get(layer.name),
            )
            for layer in self._layers
        }
        optimizer = torch.optim.Adam(self._groups(trained))
        # To nothing at the end, so that the last steps settle.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, config.iterations
        )
        losses = {"model": self._model_loss, "layer": self._layer_losses}
        learn = losses[config.scope]
        each = self._images.rows / len(self._images)
        size = max(1, round(config.batch_size / each))
        order = shuffled(len(self._images), size, config.iterations, self._seed)
        best, least, without = correction, self._look(trained).value, 0

        def after(iteration: int, figures: dict[str, str]) -> bool:
            nonlocal best, least, without
            schedule.step()
            if iteration % config.every and iteration != len(order):
                return False
            distance = self._look(trained).value
            without += 1
            if distance < least:
                best, least, without = self._state(correction, trained), distance, 0
            figures |= {self._objective.name: f"{distance:.4g}", "best": f"{least:.4g}"}
            return without >= config.patience

        done = descend(
            "refine",
            optimizer,
            order,
            lambda batch: {"loss": learn(batch, trained)},
            after,
            f"refine.lr ({config.lr})",
        )
        seen = {image for batch in order[:done] for image in batch}
        return Fitted(best, done, len(seen))

    def _groups(self, trained: Mapping[str, Trained]) -> list[Group]:
        """Shifts at a rate relative to their layer's output, factors to themselves."""
        lr, scales = self._config.lr, self._output_scales()
        shifts: list[Group] = [
            {"params": [each.shift], "lr": lr * scales[name]}
            for name, each in trained.items()
            if scales.get(name)
        ]
        factors = [
            factor for each in trained.values() for factor in each.factors.values()
        ]
        return [*shifts, *relative_groups(factors, lr)]

    def _state(
        self, correction: Correction, trained: Mapping[str, Trained]
    ) -> Correction:
        adapters = {name: each.adapter() for name, each in trained.items()}
        shifts = {name: each.shift.detach().clone() for name, each in trained.items()}
        return replace(
            correction,
            adapters={n: adapter for n, adapter in adapters.items() if adapter},
            shifts={name: shift for name, shift in shifts.items() if shift.any()},
        )

    @torch.no_grad()
    def _look(self, trained: Mapping[str, Trained]) -> Distance:
        return self._trial(
            {name: each.weight() for name, each in trained.items()},
            {name: each.shift for name, each in trained.items()},
        )

    @torch.no_grad()
    def _output_scales(self) -> dict[str, float]:
        """Root mean square of each layer's float output, over a few images."""
        scales: dict[str, float] = {}

        def watch(name: str, _: Tensor, output: Tensor) -> None:
            scales[name] = float(output.square().mean().sqrt())

        group = self._images.groups(size=self._config.batch_size)[0]
        with self._host.acting(quantized=False), self._host.observe(watch):
            self._host.run(self._images.batch(group))
        return scales

    def _model_loss(
        self, batch: Sequence[int], trained: Mapping[str, Trained]
    ) -> float:
        """Distance of the network's outputs; leaves its gradients."""
        host, images = self._host, self._images
        groups = images.groups(processes.mine(batch), len(batch))
        targets = [self._references(group) for group in groups]
        with torch.enable_grad():
            weights = {name: each.weight() for name, each in trained.items()}
            shifts = {name: each.shift for name, each in trained.items()}
            with host.acting(weights, shifts):
                each = [
                    self._objective.distance(target, host.run(images.batch(group)))
                    for group, target in zip(groups, targets, strict=True)
                ]
                loss = averaged(each)
                if not groups:  # Fewer images than processes.
                    return 0.0
                if not loss.requires_grad:
                    raise ModelError(
                        "refine: no gradient reaches any layer, for the forward cuts "
                        "it off (no_grad, detach); use refine.scope=layer"
                    )
                loss.backward()
        return float(loss.detach())

    def _layer_losses(
        self, batch: Sequence[int], trained: Mapping[str, Trained]
    ) -> float:
        """Each layer's own output error over its float output's size, squared, summed.

        Every layer sees what those before it make of the images, but no gradient
        passes from one to another, and only one layer's graph exists at a time.

        An error is over its layer's output for the whole batch, so that the batch is
        not shared among processes: all do the same.
        """
        groups = self._images.groups(batch, len(batch))
        return sum(self._layer_loss(group, trained) for group in groups)

    def _layer_loss(
        self, group: Sequence[int], trained: Mapping[str, Trained]
    ) -> float:
        host, images, total = self._host, self._images.batch(group), 0.0
        originals: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            weights = {name: each.weight() for name, each in trained.items()}
            shifts = {name: each.shift.detach() for name, each in trained.items()}
            with (
                host.acting(quantized=False),
                host.observe(lambda n, _, y: originals.setdefault(n, []).append(y)),
            ):
                host.run(images)
        layers = {layer.name: layer for layer in self._layers}

        def watch(name: str, x: Tensor, output: Tensor) -> None:
            nonlocal total
            if name not in trained:
                return
            original = originals[name].pop(0)
            size = original.square().sum()
            if not size:
                return
            each, operation = trained[name], layers[name].operation
            with torch.enable_grad():
                change = operation(x.detach(), each.weight() - weights[name])
                plus = each.shift - shifts[name]
                change = change + plus.view(-1, *[1] * operation.dimensions)
                loss = (original - output - change).square().sum() / size
                loss = loss / processes.count()
                loss.backward()
            total += float(loss.detach())

        with torch.no_grad(), host.acting(weights, shifts), host.observe(watch):
            host.run(images)
        return total
