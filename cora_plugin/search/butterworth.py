"""CoRa's own search (arXiv 2408.00923): learn how much of each spectrum to keep.

The cutoffs of all layers are learned together by Adam; see `relaxation` for what they
do to a layer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from cora_plugin import processes
from cora_plugin.adapters import Factors
from cora_plugin.adapters.exact import exact
from cora_plugin.config import ButterworthConfig
from cora_plugin.search.candidates import Candidate, Option
from cora_plugin.search.checkpoint import State
from cora_plugin.search.network import Network
from cora_plugin.search.relaxation import Relaxation, kernel, penalty, softened
from cora_plugin.training import Group, averaged, descend, relative_groups, shuffled

CHECKPOINT_EVERY = 10
"""Iterations from one checkpoint to the next."""


def round_up(
    candidates: Sequence[Candidate], wanted: Mapping[str, float], budget: float
) -> dict[str, Option]:
    """Round wanted ranks up, at least to 1, and bring them under the budget.

    Where the budget holds them all they stay. Otherwise it buys them one by one in the
    order in which they would be reached if all `wanted` grew from 0 in proportion, the
    cheaper first where several are reached together; what does not fit is left out.

    Args:
        candidates: The layers' options.
        wanted: `ρ K` by layer, not rounded.
        budget: What all may cost.
    """
    steps: list[tuple[float, int, str, int]] = []
    for candidate in candidates:
        # A cutoff of r/K, computed, may come out a little above.
        rank = max(1, math.ceil(wanted[candidate.name] - 1e-6))
        options = candidate.options
        for rung, below in enumerate(candidate.ranks[:-1], 1):
            if below >= rank:
                break
            price = options[rung].cost - options[rung - 1].cost
            reached = (below + 1) / wanted[candidate.name]
            steps.append((reached, price, candidate.name, rung))
    bought = {candidate.name: 0 for candidate in candidates}
    left = budget
    for _, price, name, rung in sorted(steps):
        if price <= left and bought[name] == rung - 1:
            bought[name] = rung
            left -= price
    return {c.name: c.options[bought[c.name]] for c in candidates}


class Descent:
    """Gradient descent on cutoffs, and on the adapters where those are trained.

    `cutoff` has one a candidate, in their order.

    Args:
        config: The settings.
        network: What to learn on.
        candidates: The layers whose cutoffs are learned.
        allowed: What all ranks may cost, as a budget's amount.
        unit: What a budget of amount 1 buys, in the unit of the options' costs.
    """

    def __init__(
        self,
        config: ButterworthConfig,
        network: Network,
        candidates: Sequence[Candidate],
        allowed: float,
        unit: float,
    ) -> None:
        self._config = config
        self._network = network
        self._candidates = candidates
        self._full = torch.tensor([c.ranks[-1] for c in candidates]).double()
        prices = torch.tensor([_price(c) for c in candidates]).double()
        self._prices = prices * self._full / unit  # c_l
        self._allowed = allowed
        self._relaxed, self._fixed = _relaxed(network)
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

    def learn(self, batch: Sequence[int]) -> dict[str, float]:
        """Compute gradients on some images, by index; return the loss and its parts.

        In several processes all have the same indices, and each does its share.
        """
        network, config = self._network, self._config
        groups = network.groups(batch)
        targets = [network.float_outputs(group) for group in groups]
        with torch.enable_grad(), network.weights(self._weights()):
            each = [
                network.objective.distance(
                    softened(target, config.temperature),
                    softened(network.run(group), config.temperature),
                )
                for group, target in zip(groups, targets, strict=True)
            ]
            distance = averaged(each)
            cost = (self.cutoff * self._prices).sum()
            # Of what does not depend on images, each process has an equal share.
            over = penalty(cost, self._allowed, config.gamma) / processes.count()
            # Cutoffs are a number a layer, and stay on the CPU.
            total = distance.cpu() + over
            total.backward()
        return {
            "loss": float(total.detach()),
            network.objective.name: float(distance.detach()),
            "cost": float(cost.detach()) / processes.count(),
            "of": self._allowed / processes.count(),
        }

    @torch.no_grad()
    def settle(self) -> None:
        """Clamp the cutoffs to their valid range, [1/K, 1]."""
        self.cutoff.copy_(self.cutoff.clamp(1 / self._full, torch.tensor(1.0)))

    def _weights(self) -> dict[str, Tensor]:
        kept = {
            c.name: kernel(rho, c.ranks[-1], self._config.order)
            for c, rho in zip(self._candidates, self.cutoff, strict=True)
        }
        learned = {n: self._relaxed[n].weight(each) for n, each in kept.items()}
        return {**self._fixed, **learned}

    def trained(self) -> dict[str, Factors]:
        """The factors as they are now, by layer, if they are trained."""
        if not self._config.adapter_lr:
            return {}
        return {
            name: replace(
                self._network.factors(each.layer),
                a=exact(each.a.detach()),
                b=exact(each.b.detach()),
            )
            for name, each in self._relaxed.items()
        }


class Butterworth:
    """The strategy: learn the cutoffs on a network, then take whole ranks.

    Args:
        config: Its settings.
        seed: Seeds the order of the images.
        network: What to learn on.
        unit: What a budget of amount 1 buys, in the unit of the options' costs.
    """

    def __init__(
        self, config: ButterworthConfig, seed: int, network: Network, unit: float
    ) -> None:
        self._config = config
        self._seed = seed
        self._network = network
        self._unit = unit

    def __call__(
        self, candidates: Sequence[Candidate], budget: float
    ) -> dict[str, Option]:
        """Options by layer, within `budget`.

        Raises:
            CoRaError: The loss is no longer finite, or an option is more than a rank.
        """
        if not candidates:
            return {}
        full_ranks = [c.ranks[-1] for c in candidates]  # Refuses what is no rank.
        cutoffs = self._learn(candidates, budget)
        wanted = {
            c.name: cutoff * full
            for c, cutoff, full in zip(candidates, cutoffs, full_ranks, strict=True)
        }
        return round_up(candidates, wanted, budget)

    def _learn(self, candidates: Sequence[Candidate], budget: float) -> list[float]:
        config, network = self._config, self._network
        size = network.steps(config.batch_size)
        batches = shuffled(network.images, size, config.iterations, self._seed)
        allowed = budget / self._unit
        descent = Descent(config, network, candidates, allowed, self._unit)
        fingerprint = self._fingerprint(candidates, budget)
        state = State(descent.optimizer, fingerprint)
        start = state.resume(config.checkpoint, config.iterations)

        def after(iteration: int, _: dict[str, str]) -> bool:
            descent.settle()
            state.iteration = iteration
            if iteration % CHECKPOINT_EVERY == 0:
                state.save(config.checkpoint)
            return False

        with state.kept(config.checkpoint):
            descend(
                "butterworth",
                descent.optimizer,
                batches,
                descent.learn,
                after,
                f"butterworth.lr ({config.lr}) or butterworth.gamma ({config.gamma})",
                start,
            )
        network.trained.update(descent.trained())
        cutoffs: list[float] = descent.cutoff.tolist()
        return cutoffs

    def _fingerprint(self, candidates: Sequence[Candidate], budget: float) -> str:
        """What a checkpoint must have been made for: settings, data and layers."""
        settings = asdict(self._config)
        # More iterations may follow, and the file may have moved.
        del settings["iterations"], settings["checkpoint"]
        layers = {
            c.name: [c.ranks[-1], c.options[-1].cost, c.options[-1].gain]
            for c in candidates
        }
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
    rung = len(candidate.options) - 2 or 1
    return candidate.options[rung].cost / candidate.ranks[rung]


def _first(rank: int, full: int) -> Tensor:
    """Keep `rank` singular values whole and none of the others, [K]."""
    return (torch.arange(full) < rank).double()
