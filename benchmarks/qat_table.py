"""Tables and pictures of what benchmarks/qat.py measured.

python benchmarks/qat_table.py benchmarks/qat/*.json --weights W2A4 --picture qat.svg
"""

import argparse
import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from figures import FOLDER, NAMES, markdown

Row = dict[str, Any]

ABOUT = ("model", "toolkit", "weights", "optimizer", "method", "adapters", "epochs")
NETWORKS = {"fashion": "ResNet-20", "mobilenet": "MobileNetV2"}
WAYS = {"lr": "learning rate", "trs": "transition rate"}
COLUMNS = (*ABOUT, "images", "best value", "top-1", "oscillating", "counting")


def table(rows: list[Row]) -> str:
    """One line a setting: its best value by mean top-1 held out, tested."""
    settings: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        key = tuple(row.get(name, "") for name in (*ABOUT, "images"))
        settings[key].append(row)
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
    for key, of_setting in settings.items():
        value, best = _best(of_setting)
        cells = [*key, value, _spread(best), _share(best, "oscillating")]
        cells.append(_share(best, "overhead"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def training(*names: str) -> str:
    """Top-1 by setting: PTQ, and the best value of each way to train, by held out.

    Args:
        names: Files of the folder `qat`, without `.json`.
    """
    rows = [
        row
        for name in names
        for row in json.loads((FOLDER / "qat" / f"{name}.json").read_text("utf-8"))
    ]
    # What most were trained on is said beside the table.
    usual = Counter(row["images"] for row in rows if "images" in row).most_common(1)
    lines = []
    for plain in sorted((r for r in rows if r["method"] == "ptq"), key=_network):
        of_network = [
            row
            for row in rows
            if row["method"] != "ptq" and _network(row) == _network(plain)
        ]
        keys = "epochs", "optimizer", "images"
        ways = sorted({tuple(row[key] for key in keys) for row in of_network})
        for epochs, optimizer, images in ways or [(1, "adamw", None)]:
            title = f"{plain['weights']}, {NAMES[plain['toolkit']]}"
            title += ", adapters" if plain["adapters"] else ""
            title += "" if optimizer == "adamw" else ", SGD"
            title += "" if epochs == 1 else f", {epochs} epochs"
            if images and images != usual[0][0]:
                title += f", {images:,} images"
            cells = [title, f"{plain['top1']:.1%}"]
            way = dict(zip(keys, (epochs, optimizer, images), strict=True))
            for method in ("lr", "trs"):
                wanted = {**way, "method": method}
                found = [row for row in of_network if wanted.items() <= row.items()]
                value, best = _best(found) if found else ("", [])
                top1 = f"{_spread(best)} % ({value})" if found else ""
                cells += [top1, _share(best, "oscillating")]
            lines.append(cells)
    heads = [each for way in WAYS.values() for each in (way, "oscillating")]
    networks = {f"{NETWORKS[row['model']]} on Fashion" for row in rows}
    return markdown([", ".join(sorted(networks)), "before", *heads], lines)


def _network(row: Row) -> tuple[Any, ...]:
    """Which quantized network a row is of; they sort from coarse to fine."""
    return row["weights"], row["toolkit"], row["adapters"]


RATES = ("value", "first_lr", "other_lr")


def best_rates(rows: list[Row], setting: Row) -> Row:
    """The rates that a setting trained best by, of those tried; {}: none was."""
    found = [row for row in rows if setting.items() <= row.items()]
    trained = [row for row in found if "seed" in row]
    return {name: _best(trained)[1][0][name] for name in RATES} if trained else {}


def _best(rows: list[Row]) -> tuple[str, list[Row]]:
    """What trained best, by images that neither train nor test, and its rows."""
    of_value: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_value[_tuned(row)].append(row)
    return max(of_value.items(), key=lambda each: _held_out(each[1]))


def _tuned(row: Row) -> str:
    """What a row was trained with, of all that was tried."""
    if row["method"] != "trs":
        return f"{row.get('value', '')}"
    return f"{row['value']}, all else by {row['other_lr']}"


def _held_out(rows: list[Row]) -> float:
    """Of the first seed, which tunes: the others were run for the best value alone."""
    first = min(rows, key=lambda row: row.get("seed", 0))
    return first.get("held_out_top1") or 0.0


def _spread(rows: list[Row]) -> str:
    found = [100 * row["top1"] for row in rows]
    if len(found) == 1:
        return f"{found[0]:.2f}"
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f}"


def _share(rows: list[Row], name: str) -> str:
    found = [row[name] for row in rows if row.get(name) is not None]
    return f"{statistics.mean(found):.2%}" if found else ""


def _drawn(rows: list[Row]) -> list[Row]:
    """The first row of each setting's best value."""
    settings: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if "curve" in row:
            settings[tuple(row[name] for name in (*ABOUT, "images"))].append(row)
    return [_best(of_setting)[1][0] for of_setting in settings.values()]


def picture(rows: list[Row], path: Path) -> None:
    """Draw rates, learning rates and held-out top-1 by step, of the best values."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    rates, size, right = figure.subplots(3, 1, sharex=True)
    for row in _drawn(rows):
        steps, targets, running, lr = zip(*row["curve"], strict=True)
        label = f"{row['weights']}, {NAMES[row['toolkit']]}, {WAYS[row['method']]} "
        label += f"{row['value']:g}" + (", adapters" if row["adapters"] else "")
        label += "" if row["epochs"] == 1 else f", {row['epochs']} epochs"
        style = {"ls": "--" if row["method"] == "lr" else "-", "label": label}
        (line,) = rates.plot(steps, running, **style)
        if row["method"] == "trs":
            rates.plot(steps, targets, ls=":", color=line.get_color())
        size.plot(steps, lr, color=line.get_color(), **style)
        numbers, shares = zip(*row["measured"], strict=True)
        right.plot(numbers, shares, color=line.get_color(), **style)
    rates.set_ylabel("running transition rate")
    rates.set_yscale("log")
    size.set_ylabel("learning rate of latent weights")
    size.set_yscale("log")
    right.set_ylabel("top-1 held out")
    right.set_xlabel("step")
    rates.legend(fontsize=6)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table of some files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--weights", help="these alone, with commas")
    parser.add_argument("--picture", type=Path)
    flags = parser.parse_args()
    rows = [
        row
        for file in flags.files
        for row in json.loads(file.read_text())
        if flags.weights is None or row["weights"] in flags.weights.split(",")
    ]
    print(table(rows))
    if flags.picture is not None:
        picture(rows, flags.picture)


if __name__ == "__main__":
    main()
