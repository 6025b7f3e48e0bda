"""CoRa's own search (arXiv 2408.00923): learn how much of each spectrum to keep.

Every layer has a normalised cutoff `ρ` in [1/K, 1], K its full rank. A Butterworth
kernel damps both factors of singular value i by `t_i`, which makes the rank a
differentiable matter; the cutoffs of all layers are learned together by Adam.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cora_plugin.adapters import Factors
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.config import ButterworthConfig
from cora_plugin.layer import QuantizedLayer
from cora_plugin.search.candidates import Candidate
from cora_plugin.search.checkpoint import State
from cora_plugin.search.network import Network
from cora_plugin.training import Group, relative_groups, shuffled

CHECKPOINT_EVERY = 10
"""Iterations from one checkpoint to the next."""


def log_response(ratio: Tensor, order: float) -> Tensor:
    """Log of the Butterworth power `1 / (1 + ratio^(2·order))`, which is ½ at 1."""
    # As a sigmoid it neither overflows nor loses its gradient, whatever the order.
    return F.logsigmoid(-2 * order * ratio.log())


def kernel(cutoff: Tensor, full_rank: int, order: float) -> Tensor:
    """What is left of each singular value, `t_i²` for i = 1 … K, over its maximum.

    `t_i = 1 / √(1 + ((i/K) / ρ)^(2·order))` damps a column of B and a row of A each,
    hence the square.

    Args:
        cutoff: `ρ`, a scalar.
        full_rank: K.
        order: The order of the filter; the higher, the steeper.

    Returns:
        [K], descending from 1.
    """
    index = torch.arange(1, full_rank + 1, dtype=cutoff.dtype, device=cutoff.device)
    power = log_response(index / full_rank / cutoff, order)
    return (power - power[0]).exp()


@dataclass(frozen=True)
class Relaxation:
    """One layer's weight between `Wq`, nothing kept, and `W`, all kept.

    `a` [g, K, k] and `b` [g, m/g, K] are the residual's factors at full rank, sorted by
    singular value. One merged weight runs; there is no second branch.
    """

    layer: QuantizedLayer
    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, layer: QuantizedLayer, factors: Factors) -> "Relaxation":
        """Take a layer's factors as they are."""
        like = layer.dequantized
        return cls(layer, factors.a.to(like), factors.b.to(like))

    def weight(self, kept: Tensor) -> Tensor:
        """`Wq + B diag(kept) A` for `kept` [K]."""
        residual = (self.b * kept.to(self.b)) @ self.a  # [g, m/g, k]
        return self.layer.dequantized + residual.reshape(self.layer.weight.shape)


def cross_entropy(output: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """`−Σ p log q` of the softened outputs [N, classes, …], mean over the rest."""
    target = (reference / temperature).softmax(1)
    return F.cross_entropy(output / temperature, target)


def penalty(cost: Tensor, budget: float, gamma: float) -> Tensor:
    """`γ · exp(ReLU(cost − budget))`, both in the unit of the budget."""
    return gamma * (cost - budget).relu().exp()


def hold(
    candidates: Sequence[Candidate], wanted: Mapping[str, float], budget: float
) -> dict[str, int]:
    """Round wanted ranks up, at least to 1, and bring them under the budget.

    Where the budget holds them all they stay. Otherwise it buys them one by one in the
    order in which they would be reached if all `wanted` grew from 0 in proportion, the
    cheaper first where several are reached together; what does not fit is left out.

    Args:
        candidates: The layers' choices.
        wanted: `ρ K` by layer, not rounded.
        budget: What all may cost.
    """
    steps: list[tuple[float, int, str, int]] = []
    for candidate in candidates:
        # A cutoff of r/K, computed, may come out a little above.
        most = max(1, math.ceil(wanted[candidate.name] - 1e-6))
        for rung in range(1, len(candidate.ranks)):
            below = candidate.ranks[rung - 1]
            if below >= most:
                break
            price = candidate.costs[rung] - candidate.costs[rung - 1]
            reached = (below + 1) / wanted[candidate.name]
            steps.append((reached, price, candidate.name, rung))
    bought = {candidate.name: 0 for candidate in candidates}
    left = budget
    for _, price, name, rung in sorted(steps):
        if price <= left and bought[name] == rung - 1:
            bought[name] = rung
            left -= price
    return {c.name: c.ranks[bought[c.name]] for c in candidates}


@dataclass(frozen=True)
class Loss:
    """What an iteration saw; the cost of the cutoffs is in the unit of the budget."""

    total: float
    kl: float
    cost: float


class Butterworth:
    """The strategy: learn the cutoffs on a network, then take whole ranks.

    Args:
        config: Its settings.
        seed: Seeds the order of the images.
        network: What to learn on.
    """

    def __init__(self, config: ButterworthConfig, seed: int, network: Network) -> None:
        self._config = config
        self._seed = seed
        self._network = network

    def __call__(
        self, candidates: Sequence[Candidate], budget: float
    ) -> dict[str, int]:
        """Ranks by layer, within `budget`.

        Raises:
            CoRaError: The loss is no longer finite.
        """
        if not candidates:
            return {}
        cutoffs = self._learn(candidates, budget)
        wanted = {c.name: cutoffs[c.name] * c.ranks[-1] for c in candidates}
        return hold(candidates, wanted, budget)

    def _learn(
        self, candidates: Sequence[Candidate], budget: float
    ) -> dict[str, float]:
        config, network = self._config, self._network
        names, sizes = [c.name for c in candidates], [c.ranks[-1] for c in candidates]
        full = torch.tensor(sizes, dtype=torch.float64)
        prices = torch.tensor([_price(c) for c in candidates], dtype=torch.float64)
        prices = prices * full / network.unit  # c_l
        allowed = budget / network.unit
        relaxed, fixed = self._relaxed()
        batches = shuffled(
            network.images, config.batch_size, config.iterations, self._seed
        )
        used = sorted({image for batch in batches for image in batch})
        row = {image: number for number, image in enumerate(used)}
        reference = network.float_outputs(used, len(batches[0]))

        cutoff = (1 / full).clamp_min(config.initial_cutoff).requires_grad_()
        groups: list[Group] = [{"params": [cutoff], "lr": config.lr}]
        if config.adapter_lr:
            factors = [f for each in relaxed.values() for f in (each.a, each.b)]
            groups += relative_groups(
                [factor.requires_grad_() for factor in factors], config.adapter_lr
            )
        optimizer = torch.optim.Adam(groups)

        def step(batch: Sequence[int]) -> Loss:
            """Go downhill once; the loss is that from before."""
            target = reference[[row[image] for image in batch]]
            with torch.enable_grad():
                weights = {
                    name: relaxed[name].weight(kernel(rho, size, config.order))
                    for name, rho, size in zip(names, cutoff, sizes, strict=True)
                }
                with network.weights({**fixed, **weights}):
                    output = network.run(batch)
                    distance = cross_entropy(output, target, config.temperature)
                    cost = (cutoff * prices).sum()
                    total = distance + penalty(cost, allowed, config.gamma)
                    optimizer.zero_grad()
                    total.backward()
            entropy = cross_entropy(target, target, config.temperature)
            values = (float(x.detach()) for x in (total, distance - entropy, cost))
            loss = Loss(*values)
            slopes = [f.grad for group in groups for f in group["params"]]
            if not all(map(math.isfinite, (loss.total, *map(_largest, slopes)))):
                raise CoRaError(
                    f"butterworth: the loss is {loss.total} at iteration "
                    f"{state.iteration + 1} (KL {loss.kl:.4g}, cost {loss.cost:.4g} of "
                    f"{allowed:.4g}) and cannot be followed; lower butterworth.lr "
                    f"({config.lr}) or butterworth.gamma ({config.gamma})"
                )
            optimizer.step()
            with torch.no_grad():
                cutoff.copy_(cutoff.clamp(1 / full, torch.ones_like(full)))
            return loss

        state = State(cutoff, optimizer, self._fingerprint(candidates, budget))
        start = state.resume(config.checkpoint)
        with (
            state.kept(config.checkpoint),
            tqdm(
                batches[start:],
                desc="butterworth",
                unit="iteration",
                initial=start,
                total=len(batches),
                disable=None,
            ) as progress,
        ):
            for batch in progress:
                loss = step(batch)
                progress.set_postfix(
                    loss=f"{loss.total:.4g}",
                    KL=f"{loss.kl:.4g}",
                    cost=f"{loss.cost:.4g}/{allowed:.4g}",
                )
                state.iteration += 1
                if state.iteration % CHECKPOINT_EVERY == 0:
                    state.save(config.checkpoint)
        if config.adapter_lr:
            for name, each in relaxed.items():
                network.trained[name] = replace(
                    network.factors(each.layer),
                    a=each.a.detach().double(),
                    b=each.b.detach().double(),
                )
        return dict(zip(names, cutoff.tolist(), strict=True))

    def _relaxed(self) -> tuple[dict[str, Relaxation], dict[str, Tensor]]:
        """The layers whose cutoffs are learned, and the weights of the pinned ones."""
        network = self._network
        layers = {layer.name: layer for layer in network.layers}
        relaxed = {n: Relaxation.of(e, network.factors(e)) for n, e in layers.items()}
        fixed = {
            name: relaxed.pop(name).weight(_first(rank, layers[name].full_rank))
            for name, rank in network.pinned.items()
            if name in layers
        }
        return relaxed, fixed

    def _fingerprint(self, candidates: Sequence[Candidate], budget: float) -> str:
        """What a checkpoint must have been made for: settings, data and layers."""
        settings = asdict(self._config)
        # More iterations may follow, and the file may have moved.
        del settings["iterations"], settings["checkpoint"]
        layers = {c.name: [c.ranks[-1], c.costs[-1], *c.gains[-1:]] for c in candidates}
        return json.dumps(
            {
                **settings,
                "seed": self._seed,
                "budget": budget,
                "images": [self._network.images, self._network.brightness],
                "layers": layers,
            },
            sort_keys=True,
        )


def _price(candidate: Candidate) -> float:
    """Cost of a rank of the largest factors; of the whole where factors never pay."""
    rung = len(candidate.ranks) - 2 or 1
    return candidate.costs[rung] / candidate.ranks[rung]


def _largest(slope: Tensor | None) -> float:
    return 0.0 if slope is None else float(slope.abs().max())


def _first(rank: int, full: int) -> Tensor:
    """Keep `rank` singular values whole and none of the others, [K]."""
    return (torch.arange(full) < rank).double()
