r"""Tables and a picture of what search.py wrote.

python benchmarks/search_table.py benchmarks/searches/*.json \
    --markdown benchmarks/searches.md --picture benchmarks/searches.svg
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from search import CORRECTED, DEFAULT

from cora_plugin.adapters.files import whole_file
from cora_plugin.compare.experiment import RAISED
from cora_plugin.compare.rows import METHODS
from cora_plugin.integrations.ranges import AUTO, FEW_BITS

Row = Mapping[str, Any]

NAMES = {
    "lite0": "EfficientNet-Lite0",
    "squeezenet": "SqueezeNet 1.1",
    "fashion": "ResNet-20 on Fashion-MNIST",
}

HEAD = """\
# Searches, metrics and budgets

Made by [search.py](search.py) and [search_table.py](search_table.py). Each cell: KL
divergence from the float network in nats, top-1, agreement with the float network; the
least KL of a budget is bold. Budgets are shares of the parameters; adapters have 4 bits
where nothing else is said. `seconds` are those of the whole run at the middle budget,
statistics, guard and bias correction included; rows ran at different times on a machine
that was more or less busy, so they tell magnitudes; those of a run that was halted, or
ran beside several others, are left out. `rrr butterworth` and `qera-exact butterworth`
learn the same ranks. `8 bits` has the most sensitive layers at 8 bits in place of
adapters, for as many bits; `8 bits+bc` is the same after Brevitas' bias correction.
"""

ORDER = (*METHODS, RAISED, CORRECTED)
"""Methods in the tables."""

DRAWN = {
    "svd uniform": ("#bbbbbb", "o"),
    "qera-exact uniform": ("#888888", "o"),
    "svd butterworth": ("#cc6677", "s"),
    "qera-exact butterworth": ("#aa4499", "s"),
    RAISED: ("#ddcc77", "^"),
    CORRECTED: ("#bb7700", "^"),
    "qera-exact spectral": ("#4477aa", "o"),
    DEFAULT: ("#117733", "D"),
}
"""Methods in the picture: colour and marker."""


def main() -> None:
    """Write what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--markdown", type=Path, help="default: print it")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    networks = [json.loads(path.read_text()) for path in options.results]
    networks.sort(key=_place)
    text = "\n".join([HEAD, *(_section(rows) for rows in networks)])
    if options.markdown is None:
        print(text)
    else:
        with whole_file(options.markdown) as temporary:
            Path(temporary).write_text(text)
    if options.picture is not None:
        with whole_file(options.picture) as temporary:
            suffix = options.picture.suffix.lstrip(".")
            _draw(networks).savefig(temporary, format=suffix)


def _place(rows: Sequence[Row]) -> tuple[Any, ...]:
    """Where a network's table stands: the easier settings first."""
    first = rows[0]
    weights, acts = map(int, first["weights"].removeprefix("W").split("A"))
    network = list(NAMES).index(first["model"])
    return network, -acts, -weights, _by_mse(first)


def _by_mse(row: Row) -> bool:
    """Whether Brevitas searched activation ranges; files of percentiles name none."""
    few = int(row["weights"].partition("A")[2]) <= FEW_BITS
    return row.get("act_range") == "mse" or (row.get("act_range") == AUTO and few)


def _title(rows: Sequence[Row]) -> str:
    first = rows[0]
    depthwise = ""
    if first["model"] == "lite0" and first["depthwise_bits"] == 8:
        depthwise = " (depthwise 8)"
    acts = ", activations by MSE" if _by_mse(first) else ""
    return f"{NAMES[first['model']]}, {first['weights']}{depthwise}{acts}"


def _section(rows: Sequence[Row]) -> str:
    """One network's table: a row a method, a column a budget."""
    budgets = sorted({row["budget"] for row in rows if row["budget"]}, key=float)
    found = {(row["method"], row["budget"]): row for row in rows}
    plain = found["none", ""]
    heads = [f"{float(budget):.0%}" for budget in budgets]
    lines = [
        f"## {_title(rows)}",
        "",
        f"Quantized only: KL {plain['kl']:.4f}, top-1 {plain['top1']:.1%}, "
        f"{plain['equivalent_bits']:.2f} bits. Bits with adapters: "
        + ", ".join(
            f"{found[DEFAULT, budget]['equivalent_bits']:.2f}" for budget in budgets
        )
        + ".",
        "",
        f"| method | {' | '.join(heads)} | iterations | seconds |",
        "| --- " * (3 + len(budgets)) + "|",
    ]
    best = {
        budget: min(row["kl"] for row in rows if row["budget"] == budget)
        for budget in budgets
    }
    made = {row["method"] for row in rows}
    for method in filter(made.__contains__, ORDER):
        cells = [method]
        for budget in budgets:
            row = found.get((method, budget))
            if row is None:
                cells.append("")
                continue
            kl = f"{row['kl']:.4f}"
            kl = f"**{kl}**" if row["kl"] == best[budget] else kl
            cells.append(f"{kl}, {row['top1']:.1%}, {row['agreement']:.1%}")
        mine = [found[method, b] for b in budgets if (method, b) in found]
        middle = mine[len(mine) // 2]
        seconds = f"{middle['seconds']:.0f}" if middle["seconds"] else ""
        cells += [str(middle.get("iterations") or ""), seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _draw(networks: Sequence[Sequence[Row]]) -> Figure:
    """KL against bits, a panel a network."""
    columns = min(3, len(networks))
    height = -(-len(networks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * height), layout="constrained")
    panels = list(figure.subplots(height, columns, squeeze=False).flat)
    for axes, rows in zip(panels, networks, strict=False):
        plain = next(row for row in rows if row["method"] == "none")
        for method, (colour, marker) in DRAWN.items():
            points = [row for row in rows if row["method"] == method]
            points.sort(key=lambda row: row["equivalent_bits"])
            axes.plot(
                [plain["equivalent_bits"], *(p["equivalent_bits"] for p in points)],
                [plain["kl"], *(p["kl"] for p in points)],
                color=colour,
                marker=marker,
                markersize=4,
                label=method,
                linewidth=1.2,
            )
        axes.set_yscale("log")
        axes.set_title(_title(rows), fontsize=9)
        axes.grid(visible=True, which="major", alpha=0.3)
    for axes in panels[len(networks) :]:
        axes.set_axis_off()
    figure.supxlabel("bits a weight, adapters and scales included", fontsize=9)
    figure.supylabel("KL divergence from the float network", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
