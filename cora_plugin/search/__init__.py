"""Strategies that choose treatments under a budget: one a file, one signature."""

from collections.abc import Callable

from cora_plugin.config import CoRaConfig
from cora_plugin.search.butterworth import Butterworth
from cora_plugin.search.candidates import Candidate, Option, Strategy, Treatment
from cora_plugin.search.network import Network
from cora_plugin.search.spectral import spectral
from cora_plugin.search.uniform import uniform

__all__ = [
    "Butterworth",
    "Candidate",
    "Network",
    "Option",
    "Strategy",
    "Treatment",
    "spectral",
    "strategy",
    "uniform",
]

STRATEGIES: dict[str, Callable[[CoRaConfig, Network, float], Strategy]] = {
    "uniform": lambda config, network, unit: uniform,
    "spectral": lambda config, network, unit: spectral,
    "butterworth": lambda config, network, unit: Butterworth(
        config.butterworth, config.seed, network, unit
    ),
}


def strategy(config: CoRaConfig, network: Network, unit: float) -> Strategy:
    """The strategy that a config names.

    Args:
        config: The settings.
        network: What a strategy that learns does so on.
        unit: What a budget of amount 1 buys, in the unit of the options' costs.
    """
    return STRATEGIES[config.search](config, network, unit)
