"""Pictures of a report (needs the `report` extra)."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cora_plugin.adapters.errors import CoRaError, FileError
from cora_plugin.adapters.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cora_plugin.qat.record import Transitional
    from cora_plugin.report import Report


def plot_report(report: "Report", path: str | os.PathLike[str]) -> None:
    """Draw, layer by layer, the spectrum of the error and how much of it is repaired.

    Above, the bits a weight that each layer stores, its own and its adapter's. Between,
    the share of its full rank that it got. Below, the error that each further rank
    would remove, one column a layer, with a line at the rank it got.

    Args:
        report: The report.
        path: The picture; the suffix says which format (.png, .svg, .pdf).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileError: The suffix is no format that matplotlib can draw.
    """
    import numpy as np

    rows = report.layers
    names = [row.name for row in rows]
    figure = _figure(path, max(6.0, 0.24 * len(rows) + 2), 8.0 + _room(names))
    above, between, below = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 2))
    columns = np.arange(len(rows))

    above.bar(
        columns, [row.bits for row in rows], color="#ccbb44", label="with adapter"
    )
    widths = [row.weight_bits for row in rows]
    above.bar(columns, widths, color="#4477aa", label="bit width")
    above.set_ylabel("bits a weight")
    above.legend(fontsize=6)
    between.bar(columns, [row.rank / row.full_rank for row in rows], color="#4477aa")
    between.set_ylabel("rank of full rank")
    between.set_ylim(0, 1.02)
    above.set_title(
        f"{report.after.title} to float {report.before.value:.3g} → "
        f"{report.after.value:.3g}, "
        f"{report.equivalent_bits_before:.2f} → {report.equivalent_bits:.2f} bits"
    )

    # Spectra of unequal length share an axis: the fraction of the full rank.
    height = 64
    image = np.full((height, len(rows)), np.nan)
    for column, row in enumerate(rows):
        values = np.asarray(row.spectrum)
        positive = np.where(values > 0, values, np.nan)
        index = np.arange(height) * len(values) // height
        image[:, column] = np.log10(positive[index])
    top = np.nanmax(image, initial=-np.inf)
    drawn = below.imshow(
        image,
        # What is far below everything else is all the same.
        vmin=top - 8 if np.isfinite(top) else None,
        aspect="auto",
        origin="lower",
        extent=(-0.5, len(rows) - 0.5, 0, 1),
        cmap="viridis",
    )
    for column, row in enumerate(rows):
        share = row.rank / row.full_rank
        below.plot([column - 0.5, column + 0.5], [share, share], color="red")
    below.set_ylabel("singular value (fraction of full rank)")
    _name_columns(below, names)
    figure.colorbar(drawn, ax=below, label="log10 of the loss that a rank removes")
    _save(figure, path)


def plot_sweep(report: "Report", path: str | os.PathLike[str]) -> None:
    """Draw the distance against the bits of every budget that was tried.

    Args:
        report: The report of a run with a sweep, or with a target for a budget.
        path: The picture; the suffix says which format (.png, .svg, .pdf).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        CoRaError: There was no sweep.
        FileError: The suffix is no format for pictures.
    """
    if not report.sweep:
        raise CoRaError(
            "the report has no sweep to draw; pass budgets, such as "
            "sweep=(0.02, 0.05, 0.1)"
        )
    figure = _figure(path, 6.0, 4.0)
    axes = figure.subplots()
    points = sorted(report.sweep, key=lambda point: point.equivalent_bits)
    bits = [report.equivalent_bits_before, *(p.equivalent_bits for p in points)]
    values = [report.before.value, *(p.distance.value for p in points)]
    axes.plot(bits, values, marker="o", color="#4477aa")
    axes.annotate(
        "no adapters", (bits[0], values[0]), (6, 0), textcoords="offset points"
    )
    for point in points:
        axes.annotate(
            point.budget,
            (point.equivalent_bits, point.distance.value),
            (6, 6),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, adapters and scales included")
    axes.set_ylabel(f"{report.after.title} to the float model")
    axes.grid(visible=True, which="both", alpha=0.3)
    _save(figure, path)


def plot_plan(report: "Report", path: str | os.PathLike[str]) -> None:
    """Draw the bit widths that were tried: distance on held-out images against bits.

    A line shows the error that the chosen way predicts at budgets around.

    Args:
        report: The report of a run that planned bit widths.
        path: The picture; the suffix says which format (.png, .svg, .pdf).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        CoRaError: Bit widths were not planned.
        FileError: The suffix is no format for pictures.
    """
    plan = report.plan
    if plan is None:
        raise CoRaError(
            "the report has no plan to draw; bit widths are planned with a menu and a "
            "total budget, such as menu=(3, 4, 5, 6, 8), budget='1.0 ptq'"
        )
    figure = _figure(path, 6.0, 4.0)
    axes = figure.subplots()
    bits, errors = zip(*plan["curve"], strict=True)
    axes.plot(bits, errors, ls="--", color="#bbbbbb", label="predicted, chosen way")
    ways = (
        ("with adapters", True, "o", "#4477aa"),
        ("without adapters", False, "s", "#ccbb44"),
    )
    for label, adapters, marker, color in ways:
        tried = [e for e in plan["trials"] if e["adapters"] == adapters]
        at, values = [e["bits"] for e in tried], [e["value"] for e in tried]
        axes.scatter(at, values, marker=marker, color=color, label=label)
    chosen = plan["trials"][0]
    place = chosen["bits"], chosen["value"]
    axes.scatter(*place, s=120, facecolors="none", edgecolors="red", label="chosen")
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, adapters and scales included")
    axes.set_ylabel(f"{report.after.title} to the float model, held-out")
    axes.legend(fontsize=7)
    axes.grid(visible=True, which="both", alpha=0.3)
    _save(figure, path)


def plot_transitions(transitions: "Transitional", path: str | os.PathLike[str]) -> None:
    """Draw the transition rate of a training step by step, and layer by layer.

    Args:
        transitions: What was measured.
        path: The picture; the suffix says which format (.png, .svg, .pdf).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        FileError: The suffix is no format for pictures.
    """
    steps, layers = transitions.steps, transitions.layers
    names = [each.name for each in layers]
    figure = _figure(path, max(7.0, 0.24 * len(layers) + 2), 8.0 + _room(names))
    rates, size, by_layer = figure.subplots(3, 1)
    numbers = [each.step for each in steps]
    rates.plot(numbers, [e.rate for e in steps], color="#bbbbbb", lw=0.5, label="rate")
    rates.plot(numbers, [e.running for e in steps], color="#4477aa", label="running")
    targets = [each.target for each in steps if each.target is not None]
    if targets:
        rates.plot(numbers, targets, color="red", ls="--", label="target")
    watched = [each for each in steps if each.oscillating is not None]
    if watched:
        rates.plot(
            [each.step for each in watched],
            [each.oscillating for each in watched],
            color="#228833",
            label="oscillating weights",
        )
    rates.set_ylabel("share of weights")
    rates.set_yscale("symlog", linthresh=1e-4)
    rates.legend()
    size.plot(numbers, [each.lr for each in steps], color="#4477aa")
    size.set_ylabel("learning rate of latent weights")
    size.set_xlabel("step")
    by_layer.bar(range(len(layers)), [each.rate for each in layers], color="#4477aa")
    _name_columns(by_layer, names)
    by_layer.set_ylabel("mean rate")
    _save(figure, path)


def _name_columns(axes: "Axes", names: list[str]) -> None:
    """Write names below columns, as they are: between two $ would be a formula."""
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90, fontsize=6, parse_math=False)


def _room(names: list[str]) -> float:
    """Inches that names below columns take beyond what ordinary ones do."""
    return 0.06 * max(0, max(map(len, names), default=0) - 30)


def _figure(path: str | os.PathLike[str], width: float, height: float) -> "Figure":
    """An empty figure for a file, whose format is checked."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib; pip install "cora-plugin[report]"',
            name="matplotlib",
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    suffix = Path(path).suffix.lstrip(".")
    if suffix not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise FileError(
            f"{path}: {suffix!r} is no picture format; use .png, .svg or .pdf"
        )
    return figure


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip("."), dpi=150)
