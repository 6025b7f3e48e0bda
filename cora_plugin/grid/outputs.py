"""What a comparison has measured, as Markdown, JSON and a page."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from cora_plugin.compare.html import Failed, Page, write_html
from cora_plugin.compare.rows import Row, table
from cora_plugin.strict import strict_json

RESULTS = "comparison.json"
"""The file that `cora_plugin.grid.join` reads."""


@dataclass(frozen=True)
class Comparison:
    """What a comparison has measured so far.

    Attributes:
        rows: The float model's row and one a cell.
        failed: Cells that have none, with the reason.
        left: How many cells are still to be measured.
        layers: By the cell's title, the report of its adapters, as plain values.
    """

    rows: Sequence[Row]
    failed: Sequence[Failed]
    left: int
    layers: Mapping[str, Mapping[str, Any]] = field(repr=False)


def names(rows: Sequence[Row]) -> dict[str, str]:
    """The headings of the table: what rows differ in, and what they are called by."""
    names = {
        "toolkit": "toolkit",
        "recipe": "recipe",
        "weights": "weights",
        "adapters": "method",
        "budget": "budget",
    }
    seeds = {row.label for row in rows if row.label is not None}
    return {**names, **({"seed": "label"} if len(seeds) > 1 else {})}


def write(
    result: Comparison,
    path: Path,
    title: str,
    values: Mapping[str, Any],
    facts: Mapping[str, str],
    note: str = "",
) -> None:
    """Write the table as Markdown, everything but layers as JSON, and the page.

    Args:
        result: What was measured.
        path: The folder.
        title: The heading.
        values: The recipe.
        facts: Versions and the machine.
        note: A line below the heading of the page.
    """
    heads = names(result.rows)
    whole = {
        "title": title,
        "rows": [row.to_dict() for row in result.rows],
        "failed": [asdict(each) for each in result.failed],
        "left": result.left,
        "recipe": values,
        "facts": facts,
    }
    (path / RESULTS).write_text(strict_json(whole), encoding="utf-8")
    lines = [f"# {title}", "", _markdown(table(result.rows, heads))]
    if result.failed:
        lines += ["Not measured:", ""]
        lines += [f"- {each.name}: {each.reason}" for each in result.failed]
    (path / "comparison.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    left = f"{result.left} cells are still to be measured." if result.left else ""
    page = Page(
        title=title,
        rows=result.rows,
        names=heads,
        notes=[*filter(None, (note, left))],
        failed=result.failed,
        layers=result.layers,
        settings=yaml.safe_dump(dict(values), sort_keys=False),
        facts=facts,
    )
    write_html(page, path / "report.html")


def _markdown(made: Table) -> str:
    made.box, text = box.MARKDOWN, io.StringIO()
    Console(width=1000, file=text).print(made)
    return text.getvalue()
