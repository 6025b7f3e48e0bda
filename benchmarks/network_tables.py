"""Tables of networks' accuracy: KL, top-1, bits.

Two are arranged from runs of accuracy.py: `peers` has GPTQ beside layers of 8 bits,
`rounding` GPFQ and Qronos.
"""

from statistics import mean
from typing import Any

from figures import NAMES, bold, cell, find, markdown, need, read, spread

from cora_plugin.compare.experiment import RAISED
from cora_plugin.compare.rows import ERROR, FIGURES, GAIN, NONE

LITE0 = "accuracy-lite0-W4A8-brevitas", "accuracy-lite0-W4A8-nncf"
BUDGET = "budget-lite0-W4A8-brevitas"
BUDGET_NNCF = "budget-lite0-W4A8-nncf"

BRINGS = (
    ("Brevitas PTQ", BUDGET, "ptq", NONE),
    ("Brevitas PTQ + bias correction", BUDGET, "ptq+bc", NONE),
    ("Brevitas GPTQ + bias correction", LITE0[0], "gptq+bc", NONE),
    ("**Brevitas PTQ + CoRa, same size**", BUDGET, "ptq+bc", "together", "1.0 ptq"),
    (
        "Brevitas PTQ, sensitive layers at 8 bits, bias correction",
        BUDGET,
        "ptq+bc",
        RAISED,
        "1.05 ptq",
    ),
    (
        "**Brevitas PTQ + CoRa**, adapters alone",
        BUDGET,
        "ptq+bc",
        "adapters",
        "1.05 ptq",
    ),
    ("**Brevitas PTQ + CoRa**", BUDGET, "ptq+bc", "together", "1.05 ptq"),
    (
        "NNCF PTQ + bias correction, its best setting found",
        LITE0[1],
        "ptq+bc",
        NONE,
    ),
    ("**NNCF PTQ + CoRa, same size**", BUDGET_NNCF, "ptq+bc", "together", "1.0 ptq"),
    (
        "NNCF PTQ, sensitive layers at 8 bits, bias correction",
        LITE0[1],
        "ptq+bc",
        RAISED,
    ),
    ("**NNCF PTQ + CoRa**, adapters alone", LITE0[1], "ptq+bc", "default"),
    ("**NNCF PTQ + CoRa**", BUDGET_NNCF, "ptq+bc", "together", "1.05 ptq"),
)
"""Rows of the README's table: label, file, recipe, method, a budget other than 5 %."""


def accuracy(name: str, methods: str = "") -> str:
    """Every row of accuracy.py; or those without adapters and search.py's of 5 %.

    Args:
        name: Network, bit widths and toolkit.
        methods: search.py's, separated by commas; behind the rows of plain PTQ.
    """
    rows = [dict(row) for row in read(f"accuracy-{name}")]
    if methods:
        rows = [row for row in rows if row["method"] == NONE]
        plain = [row["recipe"] in ("float", "ptq", "ptq+bc") for row in rows]
        search = name.rpartition("-")[0]
        rows[sum(plain) : sum(plain)] = [
            {**need(search, method), "recipe": "ptq", "method": method}
            for method in methods.split(", ")
        ]
    # All of it is of classes: the KL divergence says how far.
    left_out = "iterations", "distance", ERROR, GAIN
    figures = [each for each in FIGURES if each not in left_out]
    return markdown(
        ["toolkit", "recipe", "adapters", *figures],
        (
            [row["toolkit"], row["recipe"], row["method"]]
            + [cell(row, heading) for heading in figures]
            for row in rows
        ),
    )


def peers(*names: str) -> str:
    """GPTQ, alone and with layers of 8 bits, beside adapters; the least KL is bold."""
    lines = []
    for name in names:
        network = NAMES[name.split("-")[0]]
        for budget in ("", "0.2 bits", "0.5 bits"):
            rows = {
                (recipe, method): row
                # Before the toolkit's bias correction first: of two equals it is bold.
                for recipe in ("gptq", "gptq+bc", "ptq")
                for method in ((RAISED, "default") if budget else (NONE,))
                if (row := find(f"peers-{name}", method, budget, recipe))
            }
            if budget == "0.2 bits":
                rows["gptq+bc", "together"] = _together(f"budget-{name}-gptq")
            best = min(rows, key=lambda key: rows[key]["kl"]) if budget else None
            cells = {
                key: bold(f"{row['kl']:.{row.get('kl_digits', 4)}f}", key == best)
                for key, row in rows.items()
            }
            line = ["" if budget else network, f"+{budget.removesuffix(' bits') or 0}"]
            for method in (NONE, RAISED, "default"):
                after = cells.get(("gptq+bc", method))
                line.append(f"{after} ({cells['gptq', method]})" if after else "")
            line.append(cells.get(("ptq", "default"), ""))
            lines.append([*line, cells.get(("gptq+bc", "together"), "")])
    heads = ["W4A8", "bits", "GPTQ", "GPTQ, sensitive layers at 8 bits"]
    heads += ["GPTQ + adapters", "PTQ + adapters", "GPTQ at planned widths + adapters"]
    return markdown(heads, lines)


def _together(name: str) -> Any:
    """The one row of planned widths and adapters."""
    (row,) = (row for row in read(name) if row["method"] == "together")
    return row


def budgets(*names: str) -> str:
    """Bit widths and adapters in one budget, beside their parts: KL (bits).

    Mean ± standard deviation, where there are several seeds. Peers stand without the
    toolkit's bias correction where that is better.
    """
    ways = (
        ("PTQ", ["ptq"], NONE),
        ("PTQ + bias correction", ["ptq+bc"], NONE),
        ("one bit more", ["one up", "one up+bc"], NONE),
        ("sensitive layers at 8 bits", ["ptq", "ptq+bc"], RAISED),
        ("bit widths alone", ["ptq+bc"], "bits"),
        ("adapters alone", ["ptq+bc"], "adapters"),
        ("**widths and adapters**", ["ptq+bc"], "together"),
    )
    lines = []
    for name in names:
        network, weights, toolkit, *menu = name.split("-")
        title = f"{NAMES[network]}, {weights}, {NAMES[toolkit]}"
        title += "".join(f", widths {each.replace('_', ' and ')}" for each in menu)
        rows = read(f"budget-{name}")
        asked = {row["budget"] for row in rows if row["method"] == "together"}
        for budget in sorted(asked, key=lambda each: float(each.split()[0])):
            # What has a size of its own stands once.
            cells = [
                _budgeted(rows, recipes, method, "" if method == NONE else budget)
                for _, recipes, method in ways
                if method != NONE or title
            ]
            cells = [""] * (len(ways) - len(cells)) + cells
            lines.append([title, budget.replace(" ptq", " ×"), *cells])
            title = ""
    return markdown(["network", "of PTQ's bits", *(way for way, _, _ in ways)], lines)


def _budgeted(rows: list[Any], recipes: list[str], method: str, budget: str) -> str:
    """KL and bits over seeds, by that of the recipes which ends nearest to float."""
    found = [
        of_recipe
        for recipe in recipes
        if (of_recipe := [row for row in rows if _key(row) == (recipe, method, budget)])
    ]
    if not found:
        return ""
    best = min(found, key=lambda of_recipe: mean(row["kl"] for row in of_recipe))
    bits = mean(row["equivalent_bits"] for row in best)
    return f"{spread([row['kl'] for row in best])} ({bits:.2f})"


def _key(row: Any) -> tuple[str, str, str]:
    return row["recipe"], row["method"], row["budget"]


def rounding(name: str) -> str:
    """GPFQ and Qronos, alone and with adapters: KL."""
    rows = []
    for recipe in ("gpfq", "qronos"):
        wanted = ((NONE, "", recipe), (NONE, "", f"{recipe}+bc"))
        wanted += tuple(("default", budget, recipe) for budget in ("0.05", "0.1"))
        found = [need(f"rounding-{name}", *each) for each in wanted]
        rows.append([NAMES[recipe], *(cell(row, "KL") for row in found)])
    heads = ["recipe", "alone", "+ bias correction"]
    return markdown([*heads, "+ adapters of 5 %", "+ adapters of 10 %"], rows)


def learned(*names: str) -> str:
    """KL with learned ranks and with spectral ones, before the same regression."""
    budgets = ("0.02", "0.05", "0.1")
    rows = []
    for name in names:
        cells = [NAMES[name.split("-")[0]] + " " + name.split("-")[1]]
        for budget in budgets:
            methods = ("rrr butterworth", "rrr spectral")
            found = [need(name, method, budget)["kl"] for method in methods]
            cells.append(", ".join(bold(f"{kl:.4f}", kl == min(found)) for kl in found))
        rows.append(cells)
    heads = [f"{float(budget):.0%}".replace("%", " %") for budget in budgets]
    return markdown(["learned, spectral", *heads], rows)


def butterworth(*names: str) -> str:
    """KL by factors and ranks at 5 %, in brackets the seconds of the search alone."""
    titles = {
        "fashion": "Fashion ResNet-20",
        "squeezenet": "SqueezeNet 1.1",
        "lite0": "EfficientNet-Lite0",
    }
    plain = [cell(need(name, NONE), "KL") for name in names]
    rows = [["quantized only", *plain]]
    for metric in ("svd", "qera-exact", "rrr"):
        for search in ("butterworth", "spectral"):
            cells = [f"`{metric}`, {search}"]
            for name in names:
                row = need(name, f"{metric} {search}")
                seconds = row["search_seconds"]
                short = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1g}"
                cells.append(f"{cell(row, 'KL')} ({short})")
            rows.append(cells)
    heads = [titles[name.split("-")[0]] for name in names]
    return markdown(["factors, ranks", *heads], rows)


def demo() -> str:
    """The demo's table."""
    heads = ["model", "top-1", "agreement", "KL to float", "bits/weight", "seconds"]
    rows = [
        [
            row["label"],
            *(cell(row, heading) for heading in ("top-1", "agreement")),
            f"{row['kl']:.3f}",
            *(cell(row, heading) for heading in ("bits", "seconds")),
        ]
        for row in read("demo")
    ]
    return markdown(heads, rows)


def brings() -> str:
    """What adapters bring on one network, beside its best peers."""
    rows = []
    for label, name, recipe, method, *budget in BRINGS:
        row = need(name, method, *budget, recipe=recipe)
        ours = label.startswith("**")
        top, kl = cell(row, "top-1"), f"{row['kl']:.3f}"
        rows.append([label, bold(top, ours), bold(kl, ours), cell(row, "bits")])
    return markdown(["W4A8", "top-1", "KL to float", "bits/weight"], rows)
