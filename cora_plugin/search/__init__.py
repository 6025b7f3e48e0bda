"""Strategies that choose ranks under a budget: one a file, one signature."""

from collections.abc import Callable, Sequence

from cora_plugin.config import CoRaConfig
from cora_plugin.search.butterworth import Butterworth
from cora_plugin.search.candidates import Candidate
from cora_plugin.search.network import Network
from cora_plugin.search.spectral import spectral
from cora_plugin.search.uniform import uniform

__all__ = ["Butterworth", "Candidate", "Network", "spectral", "strategy", "uniform"]

Strategy = Callable[[Sequence[Candidate], float], dict[str, int]]
"""`strategy(candidates, budget)` gives ranks by layer that cost at most `budget`."""

STRATEGIES: dict[str, Callable[[CoRaConfig, Network], Strategy]] = {
    "uniform": lambda config, network: uniform,
    "spectral": lambda config, network: spectral,
    "butterworth": lambda config, network: Butterworth(
        config.butterworth, config.seed, network
    ),
}


def strategy(config: CoRaConfig, network: Network) -> Strategy:
    """The strategy that a config names; one that learns does so on the network."""
    return STRATEGIES[config.search](config, network)
