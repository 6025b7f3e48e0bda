"""The settings of CoRa that both hosts are recorded with, one change at a time."""

from typing import Any

BUDGET = {"budget": "0.3 params"}
CLOSED = {**BUDGET, "metric": "qera-exact"}
METRICS = ("svd", "lqer", "qera-approx", "qera-exact")

RANKS = {"stem": 16, "reflect": 2, "depthwise": 4, "pointwise": 4, "head": 3}
"""Adapters of every kind: the stem's is a whole weight, a depthwise one shares."""

EVERY_KIND = {"budget": 0.9, "ranks": RANKS}

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "budget 0.3": BUDGET,
    "two percent": {"budget": "2%"},
    **{
        f"{metric} {search}": {**BUDGET, "metric": metric, "search": search}
        for metric in METRICS
        for search in ("uniform", "spectral")
    },
    "rrr uniform": {**BUDGET, "metric": "rrr", "search": "uniform"},
    **{
        f"butterworth {name}": {
            **BUDGET,
            "metric": metric,
            "search": "butterworth",
            "butterworth": {"iterations": 20, **more},
        }
        for name, metric, more in (
            ("svd", "svd", {}),
            ("rrr", "rrr", {"order": 2, "gamma": 0.5, "temperature": 2.0}),
            ("few images", "qera-exact", {"images": 20, "batch_size": 7}),
            ("trained adapters", "svd", {"adapter_lr": 0.01, "initial_cutoff": 0.3}),
        )
    },
    "budget in bits": {"budget": "0.5 bits"},
    "budget in bits, uniform": {"budget": "0.5 bits", "search": "uniform"},
    "budget in bits, butterworth": {
        "budget": "0.5 bits",
        "search": "butterworth",
        "butterworth": {"iterations": 20},
    },
    "budget in macs": {"budget": "0.1 macs"},
    "budget in macs, uniform": {"budget": "0.1 macs", "search": "uniform"},
    "budget in macs, butterworth": {
        "budget": "0.1 macs",
        "search": "butterworth",
        "butterworth": {"iterations": 20},
    },
    "target kl": {"budget": "0.002 kl"},
    "target kl, uniform": {"budget": "0.002 kl", "search": "uniform"},
    "target agreement": {"budget": "99% agreement"},
    "target with a sweep": {"budget": "0.002 kl", "sweep": [0.1, 0.4]},
    "sweep": {**BUDGET, "sweep": [0.05, 0.2, 0.6]},
    "sweep, closed form": {**CLOSED, "sweep": [0.05, 0.2, 0.6]},
    **{
        f"refinement of the {scope}": {
            **BUDGET,
            "fit": {"iterations": 10, "scope": scope, "every": 4, "lr": 0.01},
        }
        for scope in ("model", "layer")
    },
    "refinement behind the closed form": {**CLOSED, "fit": 10},
    "refinement of the layer behind svd": {
        "budget": 0.1,
        "metric": "svd",
        "bias_correction": "off",
        "fit": {"iterations": 10, "scope": "layer", "every": 3, "batch_size": 10},
    },
    **{
        f"bias correction {way}": {**CLOSED, "bias_correction": way}
        for way in ("own", "cascade", "off")
    },
    "regression, no bias correction": {**BUDGET, "bias_correction": "off"},
    **{
        f"adapters of {bits} bits": {**BUDGET, "adapter_bits": bits}
        for bits in (2, 8, 32)
    },
    "pinned ranks": {"budget": 0.5, "ranks": {"reflect": 3, "d*": 2, "head": 0}},
    "every kind": EVERY_KIND,
    "full ranks": {
        "budget": 1,
        "adapter_bits": 32,
        "metric": "qera-exact",
        "ranks": {"*": 8},
    },
    "diagonal blocks": {**BUDGET, "max_metric": 40},
    "all positions": {**BUDGET, "positions": 0},
    "few images, another seed": {
        **BUDGET,
        "seed": 3,
        "held_out": 0.4,
        "sensitivity_images": 10,
        "sequential_images": 12,
        "positions": 5,
        "damping": 1e-2,
    },
}
"""By name; what is not said is the default. In the words of version 0.1, which must go
on meaning what they meant."""

ALTERNATIONS: dict[str, dict[str, Any]] = {
    "alternation": {"budget": 0.2, "metric": "svd", "alternations": 3},
    "alternation, adapters of 2 bits": {
        "budget": 0.2,
        "metric": "qera-exact",
        "alternations": 2,
        "adapter_bits": 2,
    },
    "alternation, regression": {"budget": 0.2, "alternations": 2, "adapter_bits": 2},
    "alternation, rolled back": {**CLOSED, "alternations": 2},
}
"""For the host that can quantize other weights."""
