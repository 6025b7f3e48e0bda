"""Strategies that choose ranks under a budget: one a file, one signature."""

from cora_plugin.search.candidates import Candidate
from cora_plugin.search.spectral import spectral
from cora_plugin.search.uniform import uniform

__all__ = ["Candidate", "spectral", "uniform"]
