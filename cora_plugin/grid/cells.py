"""The cells of a comparison: each a recipe of its own that `cora-plugin run` reads."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from cora_plugin.compare.experiment import RAISED
from cora_plugin.compare.rows import NONE, PLANNED, settings
from cora_plugin.config import Budget
from cora_plugin.document import Document
from cora_plugin.grid.section import WIDER, CompareSection
from cora_plugin.integrations.toolkit import Toolkit
from cora_plugin.typed import unknown

JUDGES = ("objective", "axis")
"""Settings of adapters that also say how models are judged."""

Toolkits = Mapping[str, "Toolkit[Any] | str"]
"""Toolkits by name; a text says why one cannot be used."""


@dataclass(frozen=True)
class Cell:
    """One combination; `values` are those of the recipe that measures it.

    `latency` is the runtime that takes the time of the first export, blank for none.
    `absent` says why its toolkit cannot be used; blank where it can.
    """

    toolkit: str
    recipe: str
    weight_bits: int
    act_bits: int
    method: str
    budget: str
    seed: int
    values: Mapping[str, Any] = field(repr=False, compare=False)
    latency: str = field(default="", repr=False, compare=False)
    absent: str = field(default="", repr=False, compare=False)

    @property
    def title(self) -> str:
        """What it is called, for people."""
        bits = f"W{self.weight_bits}A{self.act_bits}"
        parts = (self.toolkit, self.recipe, bits, self.method, self.budget)
        return ", ".join([*filter(None, parts), f"seed {self.seed}"])

    @property
    def key(self) -> str:
        """A hash of its recipe: what is measured again when anything in it changes."""
        values = {k: v for k, v in self.values.items() if k != "output"}
        values |= {"latency": self.latency} if self.latency else {}
        text = json.dumps(values, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        """What its files are called: its title as letters and digits, and its hash."""
        words = re.sub(r"[^A-Za-z0-9.]+", "-", self.title).strip("-")
        return f"{words}-{self.key[:8]}"

    @property
    def about(self) -> dict[str, Any]:
        """The fields of its `Row` that describe it."""
        return {
            "toolkit": self.toolkit,
            "recipe": self.recipe,
            "weights": f"W{self.weight_bits}A{self.act_bits}",
            "method": self.method,
            "budget": self.budget,
            "label": str(self.seed),
        }


def cells(
    document: Document, section: CompareSection, known: Toolkits, folder: Path
) -> list[Cell]:
    """Every combination that there is, once.

    A PTQ recipe that a toolkit does not have makes no cell of it, nor does a budget
    that a method cannot spend; what no budget changes is one cell for all budgets.

    Args:
        document: The recipe.
        section: Its lists.
        known: The toolkits of the section.
        folder: What the cells' own folders are in.

    Raises:
        ConfigError: No toolkit has one of the PTQ recipes, or a method can spend none
            of the budgets.
    """
    for recipe in section.recipes:
        if not any(_has(toolkit, recipe) for toolkit in known.values()):
            there = [t for t in known.values() if not isinstance(t, str)]
            names = dict.fromkeys(name for t in there for name in t.recipes)
            problem = unknown("PTQ recipe", recipe, list(names))
            raise document.error(("compare", "recipes"), problem)
    for method in section.methods:
        if not any(_fits(method, budget) for budget in section.budgets):
            problem = f"{method!r} plans bit widths, which needs a total: '1.05 ptq'"
            raise document.error(("compare", "budgets"), problem)
    found = dict.fromkeys(_combinations(document, section, known))
    return [
        replace(cell, values={**cell.values, "output": str(folder / cell.name)})
        for cell in found
    ]


def _combinations(
    document: Document, section: CompareSection, known: Toolkits
) -> Iterator[Cell]:
    all_lists = product(
        known.items(),
        section.recipes,
        section.weight_bits,
        section.act_bits,
        section.methods,
        tuple(product(section.budgets, section.seeds)),
    )
    for (name, toolkit), recipe, weight_bits, act_bits, method, last in all_lists:
        budget, seed = last
        if not (_has(toolkit, recipe) and _fits(method, budget)):
            continue
        base = document.values
        values = {k: v for k, v in base.items() if k not in ("compare", "output")}
        values["toolkit"] = name
        values["data"] = {**document.at(("data",)), "seed": seed}
        wider, corrected = WIDER.get(method, (0, False))
        values["ptq"] = {
            **document.at(("ptq",)),
            **section.ptq.get(name, {}),
            **({} if isinstance(toolkit, str) else toolkit.recipes[recipe]),
            "weight_bits": weight_bits + wider,
            "act_bits": act_bits,
            **({"bias_correction": corrected} if method in WIDER else {}),
        }
        values["cora"] = _cora(base.get("cora"), method, budget, weight_bits)
        # Cells without adapters are judged as those with them.
        judged = {k: v for k, v in _common(base.get("cora")).items() if k in JUDGES}
        if judged:
            values["test"] = {**judged, **(base.get("test") or {})}
        values["exports"] = section.exports.get(name, base.get("exports") or [])
        yield Cell(
            name,
            recipe,
            weight_bits,
            act_bits,
            method,
            str(budget) if _is_budgeted(method) else "",
            seed,
            values,
            section.latency or "",
            toolkit if isinstance(toolkit, str) else "",
        )


def _cora(
    common: Any, method: str, budget: float | str, bits: int
) -> "dict[str, Any] | bool":
    """The settings of a method, over those that the recipe has for all."""
    if method == NONE or method in WIDER:
        return False
    spent = {"budget": budget} if _is_budgeted(method) else {}
    if method == RAISED:
        chosen = {**settings("bits"), "menu": (bits, 8)}
    else:
        chosen = settings(method)
    found = {**_common(common), **spent, **chosen}
    # As YAML has them.
    return {k: [*v] if isinstance(v, tuple) else v for k, v in found.items()}


def _is_budgeted(method: str) -> bool:
    """Whether a budget changes what the method does."""
    if method == NONE or method in WIDER:
        return False
    return method == RAISED or settings(method).get("search") != "series"


def _fits(method: str, budget: float | str) -> bool:
    """Whether a method can spend a budget: bit widths are planned in a total."""
    planned = method == RAISED or method in PLANNED
    return not planned or Budget.parse(budget).is_total


def _has(toolkit: "Toolkit[Any] | str", recipe: str) -> bool:
    # What an absent toolkit would have is not known.
    return isinstance(toolkit, str) or recipe in toolkit.recipes


def _common(cora: Any) -> dict[str, Any]:
    """The recipe's own settings of adapters, but a budget: the list says that."""
    if isinstance(cora, str):
        cora = Document.of_flags(cora, "budget").values
    return dict(cora) if isinstance(cora, dict) else {}
