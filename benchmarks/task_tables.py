"""The table of networks of other tasks, from what tasks.py measured."""

from collections.abc import Mapping
from typing import Any

from figures import NAMES, bold, find, markdown, need

from cora_plugin.compare.rows import NONE

DECIBELS = "dB"


def tasks(*names: str) -> str:
    """Distance to float and the task's own measure, by network and toolkit.

    Args:
        names: Network, bit widths and toolkit, such as vit-W4A8-nncf.
    """
    lines = []
    for name in names:
        network, _, toolkit = name.split("-")
        file = f"tasks-{name}"
        plain = need(file, NONE, recipe="ptq")
        ways = [
            plain,
            need(file, NONE, recipe="ptq+bc"),
            need(file, "default", recipe="ptq+bc"),
        ]
        best = min(way["distance"] for way in ways[:2])
        ours = ways[-1]
        times = best / ours["distance"]
        floats = find(file, NONE, recipe="float")
        lines.append(
            [
                f"{network}, {NAMES[toolkit]}",
                plain["objective"],
                *(f"{way['distance']:.2g}" for way in ways[:2]),
                bold(f"{ours['distance']:.2g}"),
                f"{times:.1f} ×",
                f"{plain['equivalent_bits']:.2f} → {ours['equivalent_bits']:.2f}",
                *(measured(row) for row in (floats, *ways)),
            ]
        )
    heads = ["network", "distance", "PTQ", "+ bias correction", "+ CoRa", "less"]
    heads += ["bits/weight", "float", "PTQ", "+ bias correction", "+ CoRa"]
    return markdown(heads, lines)


def measured(row: Mapping[str, Any]) -> str:
    """The task's own measure: decibels, or a share."""
    if row["unit"] == DECIBELS:
        return f"{row['measured']:.2f} {DECIBELS}"
    return f"{row['measured']:.1%}"
