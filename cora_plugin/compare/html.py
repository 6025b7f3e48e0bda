"""The report of a comparison, a run or the demo as one HTML file.

The file opens offline and fetches nothing: style, plots and the script that sorts
tables are in it, and without scripts everything but sorting is there.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from cora_plugin.adapters.files import whole_file
from cora_plugin.compare.machine import machine, versions
from cora_plugin.compare.rows import DETAILS, FIGURES, Row, written
from cora_plugin.compare.scatter import Point, Scatter, scatter
from cora_plugin.objective import TITLES
from cora_plugin.report import Report

BITS = "bits a weight, adapters and scales included"


@dataclass(frozen=True)
class Failed:
    """A model that could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report says.

    Attributes:
        title: Its heading.
        rows: The models.
        names: Headings of what models are called by, each with the field of `Row`.
        notes: Lines below the title.
        failed: Models that have no row, with the reason.
        layers: Reports whose layers are shown, by a name; also as `Report.to_dict`
            writes them.
        settings: How all this was asked for, as text.
        facts: Versions and the machine; by default those of this process.
    """

    title: str
    rows: Sequence[Row]
    names: Mapping[str, str]
    notes: Sequence[str] = ()
    failed: Sequence[Failed] = ()
    layers: Mapping[str, Report | Mapping[str, Any]] = field(default_factory=dict)
    settings: str = ""
    facts: Mapping[str, str] = field(default_factory=lambda: versions() | machine())


@dataclass(frozen=True)
class Column:
    """A heading, and whether numbers stand below."""

    heading: str
    figure: bool


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the number that it is sorted by."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """The table of all rows, without columns in which nothing stands."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def html(page: Page) -> str:
    """The report as the text of an HTML file."""
    # Everything is escaped: names of layers, paths and errors come from outside.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    text = files("cora_plugin.compare").joinpath("report.html.j2").read_text("utf-8")
    template = environment.from_string(text)
    plans = {
        name: plan
        for index, (name, report) in enumerate(page.layers.items())
        if (plan := _plan(report, f"trial-{index}"))
    }
    return template.render(
        page=page, table=_table(page), plots=_plots(page), plans=plans
    )


def write_html(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the report, whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    with whole_file(path) as temporary:
        Path(temporary).write_text(html(page), encoding="utf-8")


def _table(page: Page) -> Table:
    columns = [
        (Column(heading, False), [_word(row, name) for row in page.rows])
        for heading, name in page.names.items()
    ]
    for source in (FIGURES, DETAILS):
        for heading, (name, form) in source.items():
            cells = [_figure(_value(row, name), form) for row in page.rows]
            columns.append((Column(heading, True), cells))
    kept = [(head, cells) for head, cells in columns if any(c.text for c in cells)]
    rows = list(zip(*(cells for _, cells in kept), strict=True))
    return Table([head for head, _ in kept], rows)


@dataclass(frozen=True)
class Tried:
    """The plans of bit widths that were tried, and their plot.

    Ids of the rows begin with `table`.
    """

    table: str
    rows: Sequence[Sequence[Cell]]
    plot: Scatter | None


def _plan(report: Report | Mapping[str, Any], table: str) -> Tried | None:
    """How bit widths were planned, best first; None where they were not."""
    whole = report.to_dict() if isinstance(report, Report) else report
    plan = whole.get("plan")
    if not plan:
        return None
    rows, points = [], []
    for index, each in enumerate(plan["trials"]):
        menu = "/".join(map(str, each["menu"])) or "the toolkit's widths"
        ways = "with adapters" if each["adapters"] else "without"
        if each.get("regressed"):
            ways += ", regression"
        rows.append(
            [
                Cell(menu),
                Cell(ways),
                _figure(each["bits"], ".3f"),
                _figure(each["value"], ".4g"),
                _figure(each["predicted"], ".4g"),
            ]
        )
        if each["value"] and math.isfinite(each["value"]):
            group = "chosen" if index == 0 else "tried"
            text = f"{menu} {ways}: {each['value']:.4g}"
            points.append(Point(each["bits"], each["value"], group, index, text))
    curve = [(bits, left) for bits, left in plan["curve"] if left > 0]
    plot = scatter(
        points,
        "Bit widths: what was tried",
        BITS,
        "distance on held-out images",
        curve,
        "is the error that the chosen way predicts at other budgets",
        table,
    )
    return Tried(table, rows, plot)


def _value(row: Row, name: str) -> Any:
    return getattr(row, name, row.details.get(name))


def _word(row: Row, name: str) -> Cell:
    value = _value(row, name)
    return Cell("" if value is None else str(value))


def _figure(value: Any, form: str) -> Cell:
    if value is None:
        return Cell("")
    # What is not finite is shown, but there is no order for it.
    number = float(value)
    return Cell(written(value, form), number if math.isfinite(number) else None)


def _plots(page: Page) -> list[Scatter]:
    found = []
    other = next((row.objective for row in page.rows if row.kl is None), None)
    distance = TITLES["kl"] if other is None else TITLES.get(other, other)
    for name, title, axis, unit in (
        ("equivalent_bits", f"Bits against {distance}", BITS, 1),
        ("bytes", f"File size against {distance}", "megabytes of the export", 1e6),
        ("ms", f"Latency against {distance}", "milliseconds an image", 1),
    ):
        points = [
            Point(x / unit, y, row.toolkit or "", index, _tip(page, row))
            for index, row in enumerate(page.rows)
            # A distance of 0 has no place on a logarithmic axis: the float model's.
            if (x := _value(row, name)) is not None
            and (y := row.distance if row.kl is None else row.kl)
            and math.isfinite(y)
        ]
        plot = scatter(points, title, axis, f"{distance} to float")
        if plot is not None:
            found.append(plot)
    return found


def _tip(page: Page, row: Row) -> str:
    """What hover tells of a point: what the model is called, and its figures."""
    words = [_word(row, name).text for name in page.names.values()]
    figures = [
        f"{heading} {text}"
        for heading, (name, form) in FIGURES.items()
        if (text := _figure(_value(row, name), form).text)
    ]
    return ", ".join([*filter(None, words), *figures])
