"""The folder of a comparison: its recipe, and what is known of each cell."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cora_plugin.adapters.errors import FileError
from cora_plugin.adapters.files import whole_file
from cora_plugin.document import Document
from cora_plugin.grid.cells import Cell
from cora_plugin.recipe.folder import locked

CELLS = "cells"
"""Its sub-folder with a recipe, an outcome, a log and a run's folder for each cell."""

LISTS = ("compare", "output")
"""Keys that may change between two calls: longer lists keep what is measured."""


class Folder:
    """A folder of results.

    Args:
        path: Where it is; made by `opened`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells = path / CELLS

    def check(self, document: Document) -> None:
        """Refuse a folder that holds the results of another recipe.

        Raises:
            FileError: It does; the message says which sections differ.
        """
        kept = self.path / "recipe.yaml"
        if not kept.exists():
            return
        there, here = _base(Document.read(kept).values), _base(document.values)
        differ = [k for k in {**there, **here} if there.get(k) != here.get(k)]
        if differ or not self.cells.is_dir():
            what = f"differs in {', '.join(differ)}" if differ else "is a run's"
            raise document.error(
                ("output",),
                f"{self.path} holds the results of another recipe, which {what}; name "
                "another folder, or remove it",
                FileError,
            )

    @contextmanager
    def opened(self, document: Document) -> Iterator[None]:
        """Make the folder, note whose it is, and keep others out within the block.

        Raises:
            FileError: Another comparison is writing to it.
            OSError: It cannot be made or written to.
        """
        self.cells.mkdir(parents=True, exist_ok=True)
        with locked(document, self.path, "comparison"):
            self._write(self.path / "recipe.yaml", yaml.safe_dump(document.values))
            yield

    def prepare(self, cell: Cell) -> None:
        """Write the cell's recipe, and forget what came of it."""
        self.outcome_path(cell).unlink(missing_ok=True)
        text = yaml.safe_dump(dict(cell.values), sort_keys=False)
        self._write(self.recipe_path(cell), text)

    def recipe_path(self, cell: Cell) -> Path:
        """The cell's recipe, which `cora-plugin run` takes, too."""
        return self.cells / f"{cell.name}.yaml"

    def outcome_path(self, cell: Cell) -> Path:
        """What came of the cell: its rows, or the reason why there are none."""
        return self.cells / f"{cell.name}.json"

    def log_path(self, cell: Cell) -> Path:
        """What the cell's process said."""
        return self.cells / f"{cell.name}.log"

    def fail(self, cell: Cell, reason: str) -> None:
        """Note why there are no rows."""
        self._write(self.outcome_path(cell), json.dumps({"reason": reason}))

    def outcome(self, cell: Cell) -> Mapping[str, Any] | None:
        """What came of the cell; None where it is still to be measured.

        A file that was cut off counts as none. The cell's hash is in the name.
        """
        try:
            found: Any = json.loads(self.outcome_path(cell).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _write(self, path: Path, text: str) -> None:
        with whole_file(path) as temporary:
            Path(temporary).write_text(text, encoding="utf-8")


def _base(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in LISTS}
