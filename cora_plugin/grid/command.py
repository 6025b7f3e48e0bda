"""`cora-plugin compare`: measures every cell, writes tables and a page."""

import copy
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cora_plugin.adapters.errors import ConfigError
from cora_plugin.compare.html import Failed
from cora_plugin.compare.machine import machine, versions
from cora_plugin.compare.rows import (
    DETAILS,
    ERROR,
    FIGURES,
    NONE,
    Row,
    show,
    table,
)
from cora_plugin.document import Document
from cora_plugin.grid.cells import Cell, cells
from cora_plugin.grid.folder import Folder
from cora_plugin.grid.outputs import Comparison, names, write
from cora_plugin.grid.schedule import Done, Limits, Tell, run_cells
from cora_plugin.grid.section import CompareSection
from cora_plugin.integrations.required import require
from cora_plugin.integrations.toolkit import Toolkit, load_toolkit
from cora_plugin.recipe import Recipe, check
from cora_plugin.recipe.folder import expanded

MANY = 64
"""More cells than this are measured only where they are asked for twice."""

FIRST = ("top-1", "KL", "distance", "bits")
"""Columns of figures that a narrow console shows, too."""

SPARE = (
    ERROR,
    *(h for h in reversed([*FIGURES, *DETAILS]) if h not in (*FIRST, ERROR)),
)
"""The others, in the order in which they are left out."""

Runner = Callable[[Sequence[Cell], Folder, Done, Tell], None]
"""Measures cells into a folder, and tells of each."""


def compare(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    jobs: int | None = None,
    yes: bool = False,
    retry: bool = False,
    only_check: bool = False,
    ray: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Measure every cell of a recipe's `compare` section that is not yet measured.

    Args:
        path: The recipe.
        overrides: Values to replace, such as `data.images=24`.
        jobs: How many cells run at once; None: one, with Ray as many as have room.
        yes: Take any number of cells.
        retry: Measure failed cells again.
        only_check: Look whether all this could run, and measure nothing.
        ray: The address of a Ray cluster to run cells on; blank: one that runs here, or
            else a new one; None: cells run without Ray.
        console: Where progress and the table go.

    Raises:
        CoRaError: The recipe is wrong, its folder another recipe's, or there are too
            many cells; or none could be measured.
        ModuleNotFoundError: A package that every cell needs is not installed.
        OSError: The folder cannot be written to.
    """
    # Where no terminal says how wide it is, the table stands in full.
    wide = None if sys.stdout.isatty() else 160
    console = console or Console(file=sys.stdout, width=wide)
    if ray is not None:
        require("compare --ray", "ray")
    document = _read(path, overrides)
    section = CompareSection.read(document)
    output = document.values.get("output", "cora-compare")
    folder = Folder(expanded(document.typed(("output",), output, str)))
    known = _toolkits(document, section)
    found = cells(document, section, known, folder.cells)
    _check_cells(document, found)
    folder.check(document)
    count = f"{len(found)} cells"
    if len(found) > MANY and not (yes or only_check):
        raise document.error(
            ("compare",),
            f"{count} of up to {section.minutes:g} minutes each are more than {MANY}; "
            "shorten its lists, or pass --yes",
        )
    if only_check:
        asked = " with --yes" if len(found) > MANY else ""
        line = f"{path}: {count}, ready to run{asked}"
        console.print(line, highlight=False, soft_wrap=True)
        return Comparison([], [], len(found), {})
    with folder.opened(document):
        runner = _runner(section, jobs, ray)
        return _measured(document, section, folder, found, runner, retry, console)


def _runner(section: CompareSection, jobs: int | None, ray: str | None) -> Runner:
    """Where cells run."""
    limits = Limits(section.minutes, section.gib)

    def here(waiting: Sequence[Cell], folder: Folder, done: Done, tell: Tell) -> None:
        run_cells(waiting, folder, jobs or 1, limits, done, tell)

    def away(waiting: Sequence[Cell], folder: Folder, done: Done, tell: Tell) -> None:
        from cora_plugin.grid.ray import run_on_ray

        more: Any = {"address": ray, "config": section.ray}
        run_on_ray(waiting, folder, jobs, limits, done, tell, **more)

    return here if ray is None else away


def _measured(
    document: Document,
    section: CompareSection,
    folder: Folder,
    found: Sequence[Cell],
    runner: Runner,
    retry: bool,
    console: Console,
) -> Comparison:
    """Measure what is due; write and print all that is known then."""
    present = [cell for cell in found if not cell.absent]
    waiting = [cell for cell in present if _is_due(folder.outcome(cell), retry)]
    kept = len(present) - len(waiting)
    if kept:
        line = f"{kept} of {len(found)} cells are measured already"
        reasons = [o for c in present if "reason" in (o := folder.outcome(c) or {})]
        if reasons and not retry:
            line += f"; {len(reasons)} have failed, which --retry measures again"
        console.print(line, highlight=False)
    try:
        _run(waiting, folder, runner, console)
    finally:
        result = _gather(found, folder)
        note = f"Logs, reports and exports of each are in {folder.cells}."
        facts = versions() | machine()
        write(result, folder.path, _title(document), document.values, facts, note)
    if result.rows:
        made = table(result.rows, names(result.rows), _title(document))
        show(made, console, SPARE, "comparison.md or report.html")
    for each in result.failed:
        console.print(
            f"{each.name}: {each.reason}", highlight=False, markup=False, soft_wrap=True
        )
    console.print(
        f"written to {folder.path}", highlight=False, markup=False, soft_wrap=True
    )
    if not result.rows:
        reason = "no cell could be measured; the reasons are above"
        raise document.error(("compare",), reason)
    return result


def _read(path: Path, overrides: Sequence[str]) -> Document:
    document = Document.read(path)
    for text in overrides:
        document.override(text)
    return document


def _toolkits(
    document: Document, section: CompareSection
) -> dict[str, "Toolkit[Any] | str"]:
    """The toolkits to compare; the recipe's own where the section names none."""
    own: Any = document.values.get("toolkit")
    listed = section.toolkits or (own,)
    if listed == (None,):
        raise document.error(("compare", "toolkits"), "no toolkit; name one or more")
    known: dict[str, Toolkit[Any] | str] = {}
    for name in listed:
        try:
            known[name] = load_toolkit(name)
        except ModuleNotFoundError as error:
            known[name] = f"not installed: {error}"
        except ConfigError as error:
            raise document.error(("toolkit",), error.problem) from error
    return known


def _check_cells(document: Document, found: Sequence[Cell]) -> None:
    """Find what is wrong with all cells of a toolkit before any is measured.

    Settings of adapters stand in cells with adapters alone, and may not suit each
    budget: all of them are read.
    """
    differing: dict[tuple[str, str], Cell] = {}
    for cell in found:
        if not cell.absent:
            settings = json.dumps(cell.values["cora"], default=str)
            differing.setdefault((cell.toolkit, settings), cell)
    checked = set()
    for cell in differing.values():
        one = copy.deepcopy(document)  # It knows the lines of what the cell shares.
        one.values = {**cell.values, "output": str(Path(cell.values["output"]).parent)}
        recipe = Recipe.of(one)
        kind = cell.toolkit, bool(cell.values["cora"])
        if kind not in checked:
            checked.add(kind)
            check(recipe)


def _is_due(outcome: Mapping[str, Any] | None, retry: bool) -> bool:
    return outcome is None or (retry and "reason" in outcome)


def _run(
    waiting: Sequence[Cell],
    folder: Folder,
    runner: Runner,
    console: Console,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("", total=len(waiting))

        def done(cell: Cell) -> None:
            bar.advance(task)
            finished.append(cell)
            place = f"[{len(finished)}/{len(waiting)}] {cell.title}"
            text = f"{place}: {_said(folder.outcome(cell) or {})}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)

        def tell(running: Sequence[Cell], left: int) -> None:
            titles = "; ".join(cell.title for cell in running)
            bar.update(task, description=f"running {titles}; {left} wait")

        finished: list[Cell] = []
        if waiting:
            runner(waiting, folder, done, tell)


def _said(outcome: Mapping[str, Any]) -> str:
    if "row" not in outcome:
        return f"failed: {outcome.get('reason')}"
    row = Row.of(outcome["row"])
    bits = row.equivalent_bits
    near = (
        f"{row.objective} {row.distance:.4g}" if row.kl is None else f"KL {row.kl:.4f}"
    )
    return near + ("" if bits is None else f", {bits:.2f} bits")


def _gather(found: Sequence[Cell], folder: Folder) -> Comparison:
    rows: list[Row] = []
    failed: list[Failed] = []
    layers: dict[str, Mapping[str, Any]] = {}
    floats: dict[int, Row] = {}  # The images may go by the seed.
    left = 0
    for cell in found:
        outcome = folder.outcome(cell)
        if cell.absent:
            failed.append(Failed(cell.title, cell.absent))
        elif outcome is None:
            left += 1
        elif "row" not in outcome:
            failed.append(Failed(cell.title, outcome["reason"]))
        else:
            first = Row.of(outcome["float"])
            if not rows:
                rows.append(replace(first, toolkit="torch", method="float", label=None))
            rows.append(replace(Row.of(outcome["row"]), **cell.about))
            floats[len(rows) - 1] = first
            if outcome["layers"]:
                layers[cell.title] = outcome["layers"]
    return Comparison(_compared(rows, floats), failed, left, layers)


def _compared(rows: Sequence[Row], floats: Mapping[int, Row]) -> list[Row]:
    """Rows with their gain over the model without adapters, whose own is over float.

    Args:
        rows: The float model's row, and one a cell.
        floats: The float model on a cell's own images, by the index of its row.
    """
    plain = {_quantized(row): row for row in rows if row.method == NONE}
    found = list(rows)
    for index, other in floats.items():
        row = rows[index]
        if row.method != NONE:
            other = plain.get(_quantized(row), other)
        found[index] = row.beside(other)
    return [replace(row, right=None) for row in found]


def _quantized(row: Row) -> tuple[str | None, ...]:
    """What rows have in common whose quantized model and images are the same."""
    return row.toolkit, row.recipe, row.weights, row.label


def _title(document: Document) -> str:
    model = document.at(("model",))
    sources = ("timm", "torchvision", "factory")
    name = next((model[each] for each in sources if model.get(each)), "")
    return f"{name}, compared with the float model"
