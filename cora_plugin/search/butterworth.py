"""CoRa's own search (arXiv 2408.00923): learn how much of each spectrum to keep.

The cutoffs of all layers are learned together by Adam; see `relaxation` for what they
do to a layer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from cora_plugin.adapters import Factors
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.config import ButterworthConfig
from cora_plugin.search.candidates import Candidate
from cora_plugin.search.checkpoint import State
from cora_plugin.search.network import Network
from cora_plugin.search.relaxation import Relaxation, cross_entropy, kernel, penalty
from cora_plugin.training import Group, relative_groups, shuffled

CHECKPOINT_EVERY = 10
"""Iterations from one checkpoint to the next."""


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


class Descent:
    """Cutoffs on their way downhill, and the adapters with them where they are trained.

    `cutoff` has one a candidate, in their order; `allowed` is the budget as `Loss.cost`
    counts.

    Args:
        config: The settings.
        network: What to learn on.
        candidates: The layers whose cutoffs are learned.
        budget: What all ranks may cost.
        images: Indices of the images that will be shown.
    """

    def __init__(
        self,
        config: ButterworthConfig,
        network: Network,
        candidates: Sequence[Candidate],
        budget: float,
        images: Sequence[int],
    ) -> None:
        self._config = config
        self._network = network
        self._candidates = candidates
        self._full = torch.tensor([c.ranks[-1] for c in candidates]).double()
        prices = torch.tensor([_price(c) for c in candidates]).double()
        self._prices = prices * self._full / network.unit  # c_l
        self.allowed = budget / network.unit
        self._relaxed, self._fixed = _relaxed(network)
        self._row = {image: number for number, image in enumerate(images)}
        self._reference = network.float_outputs(images, config.batch_size)
        least = 1 / self._full
        self.cutoff = least.clamp_min(config.initial_cutoff).requires_grad_()
        self.optimizer = torch.optim.Adam(self._groups())

    def _groups(self) -> list[Group]:
        config = self._config
        groups: list[Group] = [{"params": [self.cutoff], "lr": config.lr}]
        if config.adapter_lr:
            factors = [f for each in self._relaxed.values() for f in (each.a, each.b)]
            groups += relative_groups(
                [factor.requires_grad_() for factor in factors], config.adapter_lr
            )
        return groups

    def step(self, batch: Sequence[int], number: int) -> Loss:
        """Go downhill once; the loss is that from before.

        Args:
            batch: Indices of images.
            number: Which iteration it is, for messages.

        Raises:
            CoRaError: The loss or a slope is no longer finite; nothing has moved.
        """
        temperature = self._config.temperature
        target = self._reference[[self._row[image] for image in batch]]
        with torch.enable_grad(), self._network.weights(self._weights()):
            output = self._network.run(batch)
            distance = cross_entropy(output, target, temperature)
            cost = (self.cutoff * self._prices).sum()
            total = distance + penalty(cost, self.allowed, self._config.gamma)
            self.optimizer.zero_grad()
            total.backward()
        entropy = cross_entropy(target, target, temperature)
        loss = Loss(*(float(x.detach()) for x in (total, distance - entropy, cost)))
        self._check(loss, number)
        self.optimizer.step()
        with torch.no_grad():
            self.cutoff.copy_(self.cutoff.clamp(1 / self._full, torch.tensor(1.0)))
        return loss

    def _weights(self) -> dict[str, Tensor]:
        kept = {
            c.name: kernel(rho, c.ranks[-1], self._config.order)
            for c, rho in zip(self._candidates, self.cutoff, strict=True)
        }
        learned = {n: self._relaxed[n].weight(each) for n, each in kept.items()}
        return {**self._fixed, **learned}

    def _check(self, loss: Loss, number: int) -> None:
        groups = self.optimizer.param_groups
        slopes = [f.grad for group in groups for f in group["params"]]
        if all(map(math.isfinite, (loss.total, *map(_largest, slopes)))):
            return
        config = self._config
        raise CoRaError(
            f"butterworth: the loss is {loss.total} at iteration {number} (KL "
            f"{loss.kl:.4g}, cost {loss.cost:.4g} of {self.allowed:.4g}) and cannot be "
            f"followed; lower butterworth.lr ({config.lr}) or butterworth.gamma "
            f"({config.gamma})"
        )

    def trained(self) -> dict[str, Factors]:
        """The factors as they are now, by layer, if they are trained."""
        if not self._config.adapter_lr:
            return {}
        return {
            name: replace(
                self._network.factors(each.layer),
                a=each.a.detach().double(),
                b=each.b.detach().double(),
            )
            for name, each in self._relaxed.items()
        }


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
        wanted = {
            c.name: cutoff * c.ranks[-1]
            for c, cutoff in zip(candidates, cutoffs, strict=True)
        }
        return hold(candidates, wanted, budget)

    def _learn(self, candidates: Sequence[Candidate], budget: float) -> list[float]:
        config, network = self._config, self._network
        batches = shuffled(
            network.images, config.batch_size, config.iterations, self._seed
        )
        shown = sorted({image for batch in batches for image in batch})
        descent = Descent(config, network, candidates, budget, shown)
        fingerprint = self._fingerprint(candidates, budget)
        state = State(descent.cutoff, descent.optimizer, fingerprint)
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
                loss = descent.step(batch, state.iteration + 1)
                progress.set_postfix(
                    loss=f"{loss.total:.4g}",
                    KL=f"{loss.kl:.4g}",
                    cost=f"{loss.cost:.4g}/{descent.allowed:.4g}",
                )
                state.iteration += 1
                if state.iteration % CHECKPOINT_EVERY == 0:
                    state.save(config.checkpoint)
        network.trained.update(descent.trained())
        cutoffs: list[float] = descent.cutoff.tolist()
        return cutoffs

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


def _relaxed(network: Network) -> tuple[dict[str, Relaxation], dict[str, Tensor]]:
    """The layers whose cutoffs are learned, and the weights of the pinned ones."""
    layers = {layer.name: layer for layer in network.layers}
    relaxed = {n: Relaxation.of(e, network.factors(e)) for n, e in layers.items()}
    fixed = {
        name: relaxed.pop(name).weight(_first(rank, layers[name].full_rank))
        for name, rank in network.pinned.items()
        if name in layers
    }
    return relaxed, fixed


def _price(candidate: Candidate) -> float:
    """Cost of a rank of the largest factors; of the whole where factors never pay."""
    rung = len(candidate.ranks) - 2 or 1
    return candidate.costs[rung] / candidate.ranks[rung]


def _largest(slope: Tensor | None) -> float:
    return 0.0 if slope is None else float(slope.abs().max())


def _first(rank: int, full: int) -> Tensor:
    """Keep `rank` singular values whole and none of the others, [K]."""
    return (torch.arange(full) < rank).double()
