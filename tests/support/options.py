"""Candidates whose options are ranks, as numbers."""

from cora_plugin.adapters import Form, Kind
from cora_plugin.budget import form_of
from cora_plugin.search import Candidate, Option, Treatment


def candidate(name, ranks, costs, gains=None):
    gains = gains or [0.0] * len(ranks)
    treatments = [
        Treatment((Form(Kind.LOW_RANK, rank, 8, (64, 64)),) if rank else ())
        for rank in ranks
    ]
    options = map(Option, treatments, costs, gains)
    return Candidate(name, tuple(options))


def costs(candidate):
    return [option.cost for option in candidate.options]


def gains(candidate):
    return [option.gain for option in candidate.options]


def ranks(chosen):
    return {name: option.treatment.rank for name, option in chosen.items()}


def forms(host, ranks, bits=32):
    """The terms of ranks by layer name; none where the rank is 0."""
    layers = {layer.name: layer for layer in host.layers}
    return {n: (form_of(layers[n], r, bits),) for n, r in ranks.items() if r}
