"""Refines adapters and biases by distillation to the float model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cora_plugin.adapters import Adapter
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.quantized import QuantizedTensor, quantize
from cora_plugin.config import FitConfig
from cora_plugin.divergence import Divergence
from cora_plugin.layer import Correction, Host, QuantizedLayer
from cora_plugin.training import relative_groups, shuffled

Trial = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Divergence]
"""`trial(weights, shifts)` gives the divergence on the held-out images."""


class Trained:
    """One layer's adapter and shift as parameters; what runs is their quantization.

    Gradients pass the rounding straight (Bengio et al., arXiv 1308.3432), so that the
    adapter that is stored is the one that was trained.
    """

    def __init__(
        self, layer: QuantizedLayer, adapter: Adapter | None, shift: Tensor | None
    ) -> None:
        self._layer = layer
        self._adapter = adapter
        tensors = {} if adapter is None else adapter.tensors
        self.factors = {
            name: stored.dequantize().clone().requires_grad_()
            for name, stored in tensors.items()
        }
        like = layer.dequantized
        zero = torch.zeros(len(like), dtype=like.dtype, device=like.device)
        self.shift = (zero if shift is None else shift.clone()).requires_grad_()

    def weight(self) -> Tensor:
        """`Wq + BA`, [m, n/g, *kernel]."""
        layer, adapter = self._layer, self._adapter
        if adapter is None:
            return layer.dequantized
        factors = {}
        for name, factor in self.factors.items():
            with torch.no_grad():
                lost = self._stored(name, adapter.a.bits).dequantize() - factor
            factors[name] = factor + lost
        return layer.dequantized + adapter.product(**factors)

    @torch.no_grad()
    def adapter(self) -> Adapter | None:
        """The adapter as it is now."""
        if self._adapter is None:
            return None
        bits = self._adapter.a.bits
        stored = {name: self._stored(name, bits) for name in self.factors}
        return replace(self._adapter, a=stored["a"], b=stored.get("b"))

    def _stored(self, name: str, bits: int) -> QuantizedTensor:
        return quantize(self.factors[name].detach(), bits, channels=name == "a")


@dataclass(frozen=True)
class Fitted:
    """The best correction that was seen, and what it took."""

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
        images: Images to learn on, each [n, …].
        trial: Measures a state on the held-out images.
    """

    def __init__(
        self,
        config: FitConfig,
        seed: int,
        host: Host,
        layers: Sequence[QuantizedLayer],
        images: Sequence[Tensor],
        trial: Trial,
    ) -> None:
        self._config = config
        self._seed = seed
        self._host = host
        self._layers = layers
        self._images = images[: config.images]
        self._trial = trial
        self._targets: dict[int, Tensor] = {}

    def __call__(self, correction: Correction) -> Fitted:
        """Refine a correction; the best state on the held-out images is returned.

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
        scales = self._output_scales()
        groups = [
            {"params": [each.shift], "lr": config.lr * scales[name]}
            for name, each in trained.items()
            if scales.get(name)
        ]
        factors = [
            factor for each in trained.values() for factor in each.factors.values()
        ]
        groups += relative_groups(factors, config.lr)
        optimizer = torch.optim.Adam(groups)
        # To nothing at the end, so that the last steps settle.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, config.iterations
        )
        learn = self._model_loss if config.scope == "model" else self._layer_losses
        best, best_kl, without = correction, self._look(trained).kl, 0
        order = shuffled(
            len(self._images), config.batch_size, config.iterations, self._seed
        )
        progress = tqdm(order, desc="refinement", unit="iteration", disable=None)
        done = 0
        for done, batch in enumerate(progress, 1):
            optimizer.zero_grad()
            loss = learn(batch, trained)
            if not math.isfinite(loss):
                raise CoRaError(
                    f"fit: the loss is {loss} at iteration {done} and cannot be "
                    f"followed; lower fit.lr ({config.lr})"
                )
            optimizer.step()
            schedule.step()
            if done % config.every and done != len(order):
                continue
            kl = self._look(trained).kl
            without += 1
            if kl < best_kl:
                best, best_kl, without = self._state(correction, trained), kl, 0
            progress.set_postfix(
                loss=f"{loss:.4g}",
                KL=f"{kl:.4g}",
                best=f"{best_kl:.4g}",
            )
            if without >= config.patience:
                break
        seen = {image for batch in order[:done] for image in batch}
        return Fitted(best, done, len(seen))

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
    def _look(self, trained: Mapping[str, Trained]) -> Divergence:
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

        count = min(self._config.batch_size, len(self._images))
        few = self._batch(range(count))
        with self._host.float_model(), self._host.observe(watch):
            self._host.run(few)
        return scales

    def _batch(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._images[i] for i in indices])

    @torch.no_grad()
    def _target(self, batch: Sequence[int]) -> Tensor:
        """The float model's log-probabilities; it runs each image only once."""
        new = [image for image in batch if image not in self._targets]
        if new:
            with self._host.float_model():
                outputs = self._host.run(self._batch(new))
            self._targets.update(zip(new, outputs.log_softmax(1), strict=True))
        return torch.stack([self._targets[image] for image in batch])

    def _model_loss(
        self, batch: Sequence[int], trained: Mapping[str, Trained]
    ) -> float:
        """KL(float ‖ quantized) of the network's outputs; leaves its gradients."""
        host, target, images = self._host, self._target(batch), self._batch(batch)
        with torch.enable_grad():
            weights = {name: each.weight() for name, each in trained.items()}
            shifts = {name: each.shift for name, each in trained.items()}
            with host.weights(weights, shifts):
                output = host.run(images).log_softmax(1)
                loss = F.kl_div(output, target, reduction="none", log_target=True)
                total = loss.sum(1).mean()
                total.backward()
        return float(total.detach())

    def _layer_losses(
        self, batch: Sequence[int], trained: Mapping[str, Trained]
    ) -> float:
        """Each layer's own output error over its float output's size, squared, summed.

        Every layer sees what those before it make of the images, but no gradient
        passes from one to another, and only one layer's graph exists at a time.
        """
        host, images, total = self._host, self._batch(batch), 0.0
        originals: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            weights = {name: each.weight() for name, each in trained.items()}
            shifts = {name: each.shift.detach() for name, each in trained.items()}
            with (
                host.float_model(),
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
                loss.backward()
            total += float(loss.detach())

        with torch.no_grad(), host.weights(weights, shifts), host.observe(watch):
            host.run(images)
        return total
