"""Runs the cells of a notebook of docs/notebooks, one after the other."""

import ast
import json
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


def cells(name):
    """The code of a notebook that has no outputs of an earlier run."""
    whole = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    code = [cell for cell in whole["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in code), "clear the outputs"
    return ["".join(cell["source"]) for cell in code]


def ran(name):
    """The names that the cells leave, and what the last line of each is, if a value."""
    names, values = {"__name__": "__main__"}, []
    for number, text in enumerate(cells(name)):
        tree = ast.parse(text)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        where = f"{name}, cell {number}"
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            values.append(
                eval(compile(ast.Expression(last.value), where, "eval"), names)
            )
    return names, values
