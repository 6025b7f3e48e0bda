"""The table of search.py's runs with several calibration seeds."""

from statistics import mean

from figures import FOLDER, NAMES, bold, markdown, read, spread

from cora_plugin.compare.experiment import RAISED
from cora_plugin.compare.rows import NONE, SHORT

OURS = SHORT["default"]
WAYS = {
    "PTQ": NONE,
    "8-bit layers": RAISED,
    "8-bit layers + bias correction": f"{RAISED}+bc",
    "default": OURS,
}


def seeds() -> str:
    """KL at 5 %, mean ± standard deviation over seeds; the least is bold."""
    lines = []
    for path in sorted((FOLDER / "results").glob("seeds-*.json")):
        network, bits, toolkit = path.stem.split("-")[1:]
        rows = read(path.stem)
        found = {
            heading: [row for row in rows if row["method"] == method]
            for heading, method in WAYS.items()
        }
        kl = {heading: [row["kl"] for row in each] for heading, each in found.items()}
        best = min(kl, key=lambda heading: mean(kl[heading]))
        ours = found["default"]
        lines.append(
            [
                f"{NAMES[network]}, {bits}, {NAMES[toolkit]}",
                str(len(ours)),
                *(bold(spread(kl[heading]), heading == best) for heading in WAYS),
                f"{mean(row['equivalent_bits'] for row in ours):.2f}",
                f"{mean(row['top1'] for row in ours):.1%}",
            ]
        )
    heads = ["KL, 5 % of parameters", "seeds", *WAYS, "bits", "top-1 of the default"]
    return markdown(heads, lines)
