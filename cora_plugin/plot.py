"""Pictures of a report (needs the `report` extra)."""

import os
from pathlib import Path

from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.files import whole_file
from cora_plugin.report import Report


def plot_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw, layer by layer, the spectrum of the error and how much of it is repaired.

    Above, the share of its full rank that each layer got. Below, the error that each
    further rank would remove, one column a layer, with a line at the rank it got.

    Args:
        report: The report.
        path: The picture; the suffix says which format (.png, .svg, .pdf).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        CoRaError: The suffix is no format that matplotlib can draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib; pip install "cora-plugin[report]"',
            name="matplotlib",
        ) from error
    import numpy as np

    suffix = Path(path).suffix.lstrip(".")
    rows = report.layers
    figure = Figure(figsize=(max(6.0, 0.24 * len(rows) + 2), 6.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if suffix not in canvas.get_supported_filetypes():
        raise CoRaError(
            f"{path}: {suffix!r} is no picture format; use .png, .svg or .pdf"
        )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    columns = np.arange(len(rows))

    above.bar(columns, [row.rank / row.full_rank for row in rows], color="#4477aa")
    above.set_ylabel("rank of full rank")
    above.set_ylim(0, 1.02)
    above.set_title(
        f"KL to float {report.before.kl:.3g} → {report.after.kl:.3g}, "
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
    below.set_xticks(columns, [row.name for row in rows], rotation=90, fontsize=6)
    figure.colorbar(drawn, ax=below, label="log10 of the loss that a rank removes")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=150)
