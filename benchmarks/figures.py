"""What the benchmarks wrote as JSON, row by row, and how pages show a figure.

Files are named by what measured and what: accuracy-lite0-W4A8-brevitas in results/,
lite0-W4A8 in searches/. Figures that were only known together, to fewer digits or as
ratios stand in their file as they were known: "layers, report", `kl_digits`, latencies
without seconds.
"""

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cora_plugin.adapters.errors import FileError
from cora_plugin.compare.rows import FIGURES, NONE, SHORT, written

FOLDER = Path(__file__).parent

NAMES = {
    "lite0": "Lite0",
    "squeezenet": "SqueezeNet",
    "fashion": "Fashion",
    "mobilenet": "MobileNetV2 on Fashion",
    "brevitas": "Brevitas",
    "nncf": "NNCF",
    "openvino": "OpenVINO",
    "gpfq": "GPFQ",
    "qronos": "Qronos",
}
"""What tables call networks, toolkits, runtimes and recipes; others as they are."""


@cache
def read(name: str) -> Any:
    """What the file of this name holds, of results/ or of searches/."""
    for folder in ("results", "searches"):
        path = FOLDER / folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
    raise FileError(f"neither results/ nor searches/ in benchmarks has {name}.json")


def find(
    name: str, method: str, budget: str = "0.05", recipe: str | None = None
) -> Any:
    """The one row of a file, or None.

    Args:
        name: The file.
        method: The row's, by either of its names.
        budget: The row's; without adapters it has none.
        recipe: The row's; None: any.
    """
    wanted = SHORT.get(method, method), "" if method == NONE else budget
    rows = [
        row
        for row in read(name)
        if (SHORT.get(row["method"], row["method"]), row["budget"]) == wanted
        and recipe in (None, row.get("recipe"))
    ]
    if len(rows) > 1:
        raise FileError(
            f"{name}.json: {len(rows)} rows are {method!r} at {budget!r}, recipe "
            f"{recipe}; name the recipe, or keep one of them"
        )
    return rows[0] if rows else None


def need(
    name: str, method: str, budget: str = "0.05", recipe: str | None = None
) -> Any:
    """The one row of a file, which must be there; see `find`."""
    row = find(name, method, budget, recipe)
    if row is None:
        raise FileError(
            f"{name}.json: no row is {method!r} at {budget!r}, recipe {recipe}"
        )
    return row


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines
    )


def cell(row: Mapping[str, Any], heading: str) -> str:
    """A figure as every table has it, by its heading; empty if it is not known."""
    field, form = FIGURES[heading]
    value = row.get(field)
    return "" if value is None else written(value, form)


def bold(text: str, when: bool = True) -> str:
    """Bold text, where it is to be."""
    return f"**{text}**" if when else text


def spread(values: Sequence[float]) -> str:
    """A mean, and a standard deviation where there are several values."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def text(template: str) -> str:
    """Prose with figures of 5 %: "KL {lite0-W3A8/8 bits/kl:.2f}"."""

    def figure(found: re.Match[str]) -> str:
        name, method, field, form = found.groups()
        return format(need(name, method)[field], form).replace("%", " %")

    made = re.sub(r"\{([^/{}]+)/([^/{}]+)/(\w+):([^{}]+)\}", figure, template)
    if left := re.search(r"\{.*?\}", made):
        raise FileError(f"{left[0]} is no figure; write {{file/method/field:format}}")
    return made
