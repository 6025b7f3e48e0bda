"""Tables of what `cora-plugin compare` measured: peers at equal bits."""

from collections import defaultdict
from statistics import mean
from typing import Any

from figures import NAMES, bold, cell, markdown, read, spread

from cora_plugin.compare.rows import GAIN
from cora_plugin.compare.rows import Row as CompareRow

Row = dict[str, Any]


def compared(name: str) -> str:
    """KL by method and toolkit, mean ± standard deviation over seeds, and the top-1.

    What it gains over plain PTQ (that over the float network), with the ends of the
    interval, is that of the first seed. The least KL of what a budget holds is bold.

    Args:
        name: A file `comparison.json` of `compare`, as results/ calls it.
    """
    rows = [row for row in read(name)["rows"] if row.get("kl") is not None]
    rows = [row for row in rows if row["toolkit"] != "torch"]
    toolkits = list(dict.fromkeys(row["toolkit"] for row in rows))
    found: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(dict)
    for row in rows:
        of_way = found[row["recipe"], row["method"]]
        of_way.setdefault(row["toolkit"], []).append(row)
    best = {toolkit: _least(found.values(), toolkit) for toolkit in toolkits}
    lines = []
    for (recipe, method), of_way in found.items():
        cells = [method if recipe == "ptq" else f"{recipe}, {method}"]
        for toolkit in toolkits:
            cells += _cells(of_way.get(toolkit, []), best[toolkit])
        lines.append(cells)
    heads = [
        head for toolkit in toolkits for head in (f"KL, {NAMES[toolkit]}", "bits", GAIN)
    ]
    return markdown(["", *heads], lines)


def _least(ways: Any, toolkit: str) -> float:
    """The least mean KL of those at the budget."""
    of_toolkit = [way[toolkit] for way in ways if toolkit in way]
    kl = [mean(row["kl"] for row in rows) for rows in of_toolkit if rows[0]["budget"]]
    return min(kl, default=0.0)


def _cells(rows: list[Row], least: float) -> list[str]:
    if not rows:
        return ["", "", ""]
    kl = [row["kl"] for row in rows]
    bits = f"{mean(row['equivalent_bits'] for row in rows):.2f}"
    gained = cell(vars(CompareRow.of(rows[0])), GAIN)
    return [bold(spread(kl), mean(kl) == least), bits, gained]
