"""The distances that are built in, each of a model's one output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cora_plugin.adapters.errors import ConfigError, ModelError
from cora_plugin.adapters.exact import exact
from cora_plugin.outputs import Outputs, only

KEY = ("objective",)

SURE = 1e-7
"""Probabilities nearer to 0 or 1 are taken for this near, whose logits are finite."""


@dataclass(frozen=True)
class KL:
    """KL divergence of class logits from the float model's, in nats.

    Positions beside the classes count alike; a sample's distance is their mean.

    Args:
        axis: The axis of the classes, in an output [N, …].
        probabilities: Whether the outputs are probabilities, not logits.
    """

    axis: int = 1
    probabilities: bool = False
    name: str = "kl"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """`Σ p (log p − log q)` over classes, mean over positions, [N]."""
        p, q = self._log(reference), self._log(outputs)
        divergence: Tensor = (p.exp() * (p - q)).sum(1)
        return divergence if divergence.ndim == 1 else divergence.flatten(1).mean(1)

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """Log-likelihood of labels that are drawn from the outputs themselves."""
        log_likelihood = self._log(outputs)
        labels = _drawn(log_likelihood.detach(), random)
        # Positions are independent: their curvatures add up, the distance is a mean.
        count = labels[0].numel()
        probe: Tensor = log_likelihood.gather(1, labels).sum() / count**0.5
        return probe

    def agreement(self, reference: Outputs, outputs: Outputs) -> float:
        """Share of positions with the same first class."""
        same = self._log(reference).argmax(1) == self._log(outputs).argmax(1)
        return float(exact(same).mean())

    def _log(self, outputs: Outputs) -> Tensor:
        """Log-probabilities [N, classes, …].

        Raises:
            ModelError: The output has no classes along the axis.
        """
        output = only(outputs)
        axis = _axis(output, self.axis, "logits [N, classes, …]", _ONE_CLASS)
        output = output.movedim(axis, 1)
        if self.probabilities:
            return output.clamp_min(1e-12).log().log_softmax(1)
        return output.log_softmax(1)


@dataclass(frozen=True)
class Bernoulli:
    """KL divergence of logits of yes and no, one a value, mean over a sample's values.

    For classifiers of one logit, masks of one channel, and labels that do not exclude
    one another.

    Args:
        probabilities: Whether the outputs are probabilities of yes, not logits.
    """

    probabilities: bool = False
    name: str = "bernoulli"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """`p log(p/q) + (1 − p) log((1 − p)/(1 − q))` of sigmoids, mean, [N]."""
        y, z = self._logits(reference), self._logits(outputs)
        p = y.sigmoid()
        yes = p * (F.logsigmoid(y) - F.logsigmoid(z))
        no = (1 - p) * (F.logsigmoid(-y) - F.logsigmoid(-z))
        return _mean(yes + no)

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """Log-likelihood of answers that are drawn from the outputs themselves."""
        output = self._logits(outputs)
        p = output.detach().float().sigmoid().cpu()
        sign = (2 * torch.bernoulli(p, generator=random) - 1).to(output)
        probe: Tensor = F.logsigmoid(sign * output).sum() / output[0].numel() ** 0.5
        return probe

    def agreement(self, reference: Outputs, outputs: Outputs) -> float:
        """Share of values with the same answer."""
        same = (self._logits(reference) > 0) == (self._logits(outputs) > 0)
        return float(exact(same).mean())

    def _logits(self, outputs: Outputs) -> Tensor:
        value = only(outputs)
        if not self.probabilities:
            return value
        # Half precision has nothing between its last number below 1 and 1.
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        return value.logit(SURE)


@dataclass(frozen=True)
class MSE:
    """The squared error of outputs [N, …], mean over a sample's values."""

    name: str = "mse"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """`mean (y − ŷ)²`, [N]."""
        return _mean((only(outputs) - only(reference)).square())

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """The product with noise of variance 2, over the root of its size."""
        output = only(outputs)
        noise = torch.randn(output.shape, generator=random).to(output)
        probe: Tensor = (output * noise).sum() * (2 / output[0].numel()) ** 0.5
        return probe

    def agreement(self, reference: Outputs, outputs: Outputs) -> None:
        """There are no classes."""
        return None


@dataclass(frozen=True)
class Cosine:
    """One minus the cosine between vectors, mean over positions: for embeddings.

    Args:
        axis: The axis of the vectors, in an output [N, …].
    """

    axis: int = 1
    name: str = "cosine"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """`1 − y·ŷ / |y| |ŷ|`, [N].

        Raises:
            ModelError: The outputs have no vectors along the axis.
        """
        pair = only(reference), only(outputs)
        _axis(pair[1], self.axis, "vectors [N, values, …]", _ONE_NUMBER)
        alike = F.cosine_similarity(*pair, dim=self.axis, eps=1e-12)
        return _mean(1 - alike)

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """The product with unit noise across the vectors, over their length."""
        output = only(outputs)
        length = output.detach().norm(dim=self.axis, keepdim=True).clamp_min(1e-12)
        unit = output.detach() / length
        noise = torch.randn(output.shape, generator=random).to(output)
        across = noise - unit * (noise * unit).sum(self.axis, keepdim=True)
        count = length[0].numel()
        probe: Tensor = (output * across / length).sum() / count**0.5
        return probe

    def agreement(self, reference: Outputs, outputs: Outputs) -> None:
        """There are no classes."""
        return None


@dataclass(frozen=True)
class Custom:
    """Any distance; its curvature is taken for that of squared errors.

    Args:
        function: `function(reference, outputs)` of tensors [N, …], where the model has
            one output, or of mappings by name; gives the distance of each sample, [N].
    """

    function: Callable[[Any, Any], Tensor]
    name: str = "custom"

    def distance(self, reference: Outputs, outputs: Outputs) -> Tensor:
        """What the function returns, [N].

        Raises:
            ConfigError: It is not one number a sample.
        """
        pair = [only(e) if len(e) == 1 else e for e in (reference, outputs)]
        found = self.function(*pair)
        samples = len(next(iter(outputs.values())))
        if not isinstance(found, Tensor) or found.shape != (samples,):
            shape = list(found.shape) if isinstance(found, Tensor) else found
            raise ConfigError(
                KEY,
                f"the function gave {shape} for {samples} samples; return one distance "
                f"a sample, [{samples}]",
            )
        return found

    def probe(self, outputs: Outputs, random: torch.Generator) -> Tensor:
        """That of squared errors, all outputs of floats alike."""
        floats = [e for e in outputs.values() if e.is_floating_point() and e.ndim]
        parts = [MSE().probe({"": value}, random) for value in floats]
        total: Tensor = torch.stack(parts).sum()
        return total

    def agreement(self, reference: Outputs, outputs: Outputs) -> None:
        """None: the function knows of no classes."""
        return None


_ONE_CLASS = "the KL divergence over one class is always 0"
_ONE_NUMBER = "the cosine of one number is its sign alone"


def _axis(output: Tensor, axis: int, wanted: str, one: str) -> int:
    """An axis of an output, counted from the front.

    Args:
        output: The output.
        axis: The axis of its classes or vectors, counted from either end.
        wanted: What the output should be.
        one: Why one value along the axis is not enough.

    Raises:
        ModelError: There is no such axis behind the first, or one value along it.
    """
    shape = list(output.shape)
    if output.ndim < 2:
        raise ModelError(
            f"the model's output is a tensor {shape}, not {wanted}; pass objective=mse "
            "for values, objective=bernoulli for the logit of yes and no"
        )
    found = axis % output.ndim if -output.ndim < axis < output.ndim else 0
    if not found:
        raise ModelError(
            f"axis {axis} is none of the model's output {shape}, which should be "
            f"{wanted}; pass one from 1 to {output.ndim - 1}"
        )
    if output.shape[found] < 2:
        raise ModelError(
            f"the model's output {shape} has one channel along axis {axis}: {one}; "
            "pass objective=bernoulli for the logit of yes and no, objective=mse for "
            "values, or the axis of the channels"
        )
    return found


def _mean(values: Tensor) -> Tensor:
    """The mean of each sample, [N]."""
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def _drawn(log_probabilities: Tensor, random: torch.Generator) -> Tensor:
    """Draw a class for each sample and position of [N, classes, …]; [N, 1, …]."""
    last = log_probabilities.float().movedim(1, -1)  # [N, …, classes]
    drawn = torch.multinomial(last.exp().cpu().flatten(0, -2), 1, generator=random)
    return drawn.view(*last.shape[:-1], 1).movedim(-1, 1).to(log_probabilities.device)
