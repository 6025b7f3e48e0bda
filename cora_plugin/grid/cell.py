"""Measures one cell, in a process of its own: python -m cora_plugin.grid.cell NAME.

A crash, a leak or threads that hang end with the process, and so do a toolkit's patches
of torch. The process ends with the one that began it.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.files import whole_file
from cora_plugin.integrations.latency import latency
from cora_plugin.recipe import Recipe, run
from cora_plugin.recipe.results import Results
from cora_plugin.strict import strict_json


def main(arguments: Sequence[str]) -> None:
    """Run the recipe `arguments[0]` and write what came of it to `arguments[1]`.

    `arguments[2]`, if there is one, is the runtime that takes the time of the export.
    """
    recipe, target = map(Path, arguments[:2])
    try:
        results = run(Recipe.read(recipe), Console(file=sys.stdout))
        outcome = _measured(results, *arguments[2:])
    except (CoRaError, ModuleNotFoundError, OSError) as error:
        outcome = {"reason": str(error)}
    except Exception as error:  # Of a toolkit or the user's code: a row, not an end.
        traceback.print_exc()
        why = str(error).splitlines()[0] if str(error) else "no message"
        outcome = {"reason": f"{type(error).__name__}: {why}"}
    with whole_file(target) as temporary:
        Path(temporary).write_text(strict_json(outcome), encoding="utf-8")


def _measured(results: Results, runtime: str = "") -> dict[str, Any]:
    """The float model's row and the cell's, with all that the process knows."""
    report = json.loads(Path(results.recipe.output, "report.json").read_text())
    details: dict[str, Any] = {"peak_mib": _peak_mib()}
    if report["exports"]:
        first = report["exports"][0]
        details["bytes"] = first["bytes"]
        if runtime:
            path = Path(results.recipe.output, first["path"])
            details["ms"] = latency(runtime, path, results.example.numpy())
    row = replace(results.rows[-1], details=details)
    rows = {"float": results.rows[0].to_dict(), "row": row.to_dict()}
    return {**rows, "images": results.images, "layers": report["cora"]}


def _peak_mib() -> float | None:
    """The most memory that this process has held; None where no one counts it."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _end_with_input() -> None:
    """End this process and those it has begun once its standard input has ended.

    That is a pipe from the process that began it, which may be killed.
    """
    while os.read(0, 1):  # Not by sys.stdin, whose lock would be held at the end.
        pass
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    main(sys.argv[1:])
