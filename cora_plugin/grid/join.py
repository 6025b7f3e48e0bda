"""One table of several: python -m cora_plugin.grid.join TARGET FOLDER FOLDER.

Toolkits that cannot be installed together, or several versions of one, are compared in
environments of their own, each in a folder; this joins them, as `tox run -m compare`
does.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cora_plugin.adapters.errors import FileError
from cora_plugin.compare.html import Failed
from cora_plugin.compare.rows import Row
from cora_plugin.grid.outputs import RESULTS, Comparison, write


def join(target: Path, folders: Sequence[Path]) -> Comparison:
    """Write the rows of several folders as one table, each with its folder's name.

    The float model stands once. A folder without results is a line that says so.

    Args:
        target: The folder to write to; made if need be.
        folders: Those of `cora-plugin compare`.

    Raises:
        FileError: No folder has results.
        OSError: The target cannot be written to.
    """
    rows: list[Row] = []
    failed: list[Failed] = []
    facts: dict[str, str] = {}
    found: list[Mapping[str, Any]] = []
    for folder in folders:
        try:
            whole = json.loads((folder / RESULTS).read_text())
        except (OSError, ValueError):
            failed.append(Failed(folder.name, f"no results in {folder}"))
            continue
        found.append(whole)
        floats, others = _split(Row.of(row) for row in whole["rows"])
        rows += [] if rows else floats
        rows += [
            replace(row, toolkit=f"{row.toolkit} ({folder.name})") for row in others
        ]
        failed += [
            Failed(f"{folder.name}: {each['name']}", each["reason"])
            for each in whole["failed"]
        ]
        facts |= {f"{folder.name}: {k}": v for k, v in whole["facts"].items()}
    if not found:
        names = ", ".join(map(str, folders))
        raise FileError(f"no {RESULTS} in {names}; run cora-plugin compare first")
    target.mkdir(parents=True, exist_ok=True)
    result = Comparison(rows, failed, sum(each["left"] for each in found), {})
    write(result, target, found[0]["title"], found[0]["recipe"], facts)
    return result


def _split(rows: Any) -> tuple[list[Row], list[Row]]:
    """The float model's row, and all others."""
    listed = list(rows)
    floats = [row for row in listed if row.toolkit == "torch"]
    return floats, [row for row in listed if row.toolkit != "torch"]


if __name__ == "__main__":
    join(Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]])
