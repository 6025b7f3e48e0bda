"""What "near to the float model" means: distances between outputs, and their curvature.

A distance is measured sample by sample, so that any part of the data can be used. Its
second derivative at the float model's outputs is estimated by a probe: a random scalar,
the second moment of whose gradient is that curvature (for the KL divergence the Fisher,
by labels drawn from the model; for squared errors by noise).
"""

from cora_plugin.objective.choice import Choice, decide, decide_on
from cora_plugin.objective.distance import (
    TITLES,
    Distance,
    Objective,
    Sums,
    averaged,
    check_shapes,
    distances,
    measure,
    standard_error,
)
from cora_plugin.objective.kinds import KL, MSE, Bernoulli, Cosine, Custom
from cora_plugin.objective.weighted import Weighted

__all__ = [
    "KL",
    "MSE",
    "TITLES",
    "Bernoulli",
    "Choice",
    "Cosine",
    "Custom",
    "Distance",
    "Objective",
    "Sums",
    "Weighted",
    "averaged",
    "check_shapes",
    "decide",
    "decide_on",
    "distances",
    "measure",
    "standard_error",
]
