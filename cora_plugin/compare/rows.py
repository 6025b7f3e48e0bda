"""One row of figures for each compared model, and the table of all rows.

The demo, `cora-plugin run` and the benchmarks all judge by these figures.
"""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from torch import Tensor

from cora_plugin.compare.interval import Interval, gain, packed
from cora_plugin.config import CoRaConfig
from cora_plugin.objective import KL, MSE, Objective, Sums, standard_error
from cora_plugin.plain import plain

NONE = "none"
"""The method of a model without adapters."""

METHODS: Mapping[str, Mapping[str, Any]] = {
    "svd uniform": {"search": "uniform", "metric": "svd"},
    "lqer uniform": {"search": "uniform", "metric": "lqer"},
    "qera-approx uniform": {"search": "uniform", "metric": "qera-approx"},
    "qera-exact uniform": {"search": "uniform", "metric": "qera-exact"},
    "rrr uniform": {"search": "uniform"},
    "svd spectral": {"metric": "svd"},
    "lqer spectral": {"metric": "lqer"},
    "qera-approx spectral": {"metric": "qera-approx"},
    "qera-exact spectral": {"metric": "qera-exact"},
    "rrr spectral": {},
    "8-bit adapters": {"adapter_bits": 8},
    "no bias correction": {"metric": "qera-exact", "bias_correction": "off"},
    "cascade": {"metric": "qera-exact", "bias_correction": "cascade"},
    "alternation": {"metric": "qera-exact", "alternations": 3},
    "fit model": {"refine": {"iterations": 100}},
    "fit layer": {"refine": {"iterations": 100, "scope": "layer"}},
    "svd butterworth": {"search": "butterworth", "metric": "svd"},
    "lqer butterworth": {"search": "butterworth", "metric": "lqer"},
    "qera-approx butterworth": {"search": "butterworth", "metric": "qera-approx"},
    "qera-exact butterworth": {"search": "butterworth", "metric": "qera-exact"},
    "rrr butterworth": {"search": "butterworth"},
    "series": {"search": "series"},
}
"""Ways to choose and fit adapters: settings beside the budget; what is not said is the
default."""

MENU = (3, 4, 5, 6, 8)
"""Bit widths that are chosen from where nothing says which can be stored."""

PLANNED: Mapping[str, Mapping[str, Any]] = {
    "bits": {"menu": MENU, "ranks": {"*": 0}, "term_bits": ()},
    "bits and adapters": {"menu": MENU},
}
"""Methods that choose bit widths, which needs a total budget and a model that is then
quantized anew (`Toolkit.adapted`)."""

SHORT: Mapping[str, str] = {
    "default": "rrr spectral",
    "lorc": "svd uniform",
    "lqer": "lqer uniform",
    "qera-approx": "qera-approx uniform",
    "qera-exact": "qera-exact uniform",
    "butterworth": "svd butterworth",
}
"""Other names of methods."""


def settings(method: str) -> dict[str, Any]:
    """The settings of a method, by either of its names."""
    if method in PLANNED:
        return dict(PLANNED[method])
    found = METHODS[SHORT.get(method, method)]
    # Where a metric is named, it is that one's closed form alone.
    closed = "metric" in found or found.get("search") == "series"
    return {"regression": not closed, **found}


def method_name(config: CoRaConfig) -> str:
    """The name of a method by its settings: metric and search.

    The default metric with the regression behind it is called "rrr".
    """
    if config.search == "series":
        return "series" if config.terms == 1 else f"series of {config.terms}"
    metric: str = config.metric
    if config.regression:
        metric = "rrr" if metric == "qera-exact" else f"{metric} + regression"
    return f"{metric} {config.search}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model against the float network, and against the labels if there are any.

    Attributes:
        label: What was done, in a few words, for tables of one network.
        model: The network.
        toolkit: The name of the toolkit; "torch" for the float network.
        weights: Bit widths of weights and activations, such as W4A8.
        recipe: How it was quantized; "+bc" after bias correction.
        method: How adapters were chosen, "none" without.
        budget: What they may cost, as `CoRaConfig` reads it.
        top1: Share of the images whose first class is a right one; None: no labels.
        right: Which images these are, as `cora_plugin.compare.interval` packs them.
        gain: By how much that share is more than another model's, with an interval.
        agreement: Share of the images with the float network's class.
        kl: Mean KL divergence from the float network's softmax, in nats; None: the
            outputs are no classes.
        distance: Mean distance from the float network, where that is another.
        objective: What that distance is.
        error: The standard error of either mean, if the images are drawn independently;
            None: it is zero, or of one image.
        equivalent_bits: Bits a quantized weight, scales and adapters included; None:
            not counted.
        iterations: Those of a search or a refinement that learns.
        seconds: Wall time of this row's own steps.
        details: Whatever else a comparison knows.
    """

    label: str | None = None
    model: str | None = None
    toolkit: str | None = None
    weights: str | None = None
    recipe: str | None = None
    method: str | None = None
    budget: str | None = None
    top1: float | None
    right: str | None = field(default=None, repr=False)
    gain: Interval | None = None
    agreement: float | None
    kl: float | None = None
    distance: float | None = None
    objective: str | None = None
    error: float | None = None
    equivalent_bits: float | None = None
    iterations: int | None = None
    seconds: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are None."""
        values = asdict(self)
        details = values.pop("details")
        values = {name: v for name, v in values.items() if v is not None}
        return {**values, **details}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Row":
        """Read what `to_dict` has written."""
        names = {each.name for each in fields(cls)} - {"details"}
        known = {name: value for name, value in values.items() if name in names}
        details = {name: v for name, v in values.items() if name not in names}
        if isinstance(known.get("gain"), Mapping):
            known["gain"] = Interval(**known["gain"])
        return cls(**{"top1": None, "agreement": None, **known}, details=details)

    def beside(self, other: "Row") -> "Row":
        """The same with its gain over another model, where both have labels."""
        if self.right is None or other.right is None:
            return self
        return replace(self, gain=gain(self.right, other.right))


def top1(outputs: Tensor, labels: Sequence[Collection[int]] | Tensor) -> float:
    """Share of the images whose first class is a right one.

    Args:
        outputs: [N, classes].
        labels: The right class of each image [N], or all that are right for it.
    """
    right = _right(outputs, labels)
    return sum(right) / len(right)


def _right(
    outputs: Tensor, labels: Sequence[Collection[int]] | Tensor
) -> Sequence[bool]:
    known = [(n,) for n in labels.tolist()] if isinstance(labels, Tensor) else labels
    pairs = zip(outputs.argmax(1).tolist(), known, strict=True)
    return [guess in classes for guess, classes in pairs]


def judge(
    reference: Tensor,
    outputs: Tensor,
    labels: Sequence[Collection[int]] | Tensor | None = None,
    objective: Objective | None = None,
    **about: Any,
) -> Row:
    """Compare a model's outputs with the float network's; returns its row.

    Args:
        reference: Outputs of the float network, [N, classes, …].
        outputs: Those of the model.
        labels: As `top1` takes them; None: not known.
        objective: What "near to the float network" means; None: the KL divergence of
            classes, squared error where there is one channel.
        **about: Further fields of the `Row`.
    """
    if objective is None:
        one = reference.ndim < 2 or reference.shape[1] == 1
        objective = MSE() if one else KL()
    sums = Sums(objective)
    sums.add({"": reference}, {"": outputs})
    found = sums.distance
    same: dict[str, Any] = {"kl": found.value}
    if found.objective != "kl":
        labels, same = None, {"distance": found.value}
        about = {**about, "objective": found.objective}
    return Row(
        top1=None if labels is None else top1(outputs, labels),
        right=None if labels is None else packed(_right(outputs, labels)),
        agreement=found.agreement,
        error=standard_error(sums.distances) or None,
        **same,
        **about,
    )


GAIN = "Δ top-1 [95 %]"
"""The heading of gains, the widest figures."""

ERROR = "±"
"""The heading of standard errors of KL divergence and distance, beside either."""

FIGURES: Mapping[str, tuple[str, str]] = {
    "top-1": ("top1", ".1%"),
    GAIN: ("gain", "+.1%"),
    "agreement": ("agreement", ".1%"),
    "KL": ("kl", ".4f"),
    "distance": ("distance", ".4g"),
    ERROR: ("error", ".2g"),
    "bits": ("equivalent_bits", ".2f"),
    "iterations": ("iterations", "d"),
    "seconds": ("seconds", ".0f"),
}
"""The columns of every table by their headings: field and format."""

DETAILS: Mapping[str, tuple[str, str]] = {
    "bytes": ("bytes", ",d"),
    "ms": ("ms", ".2f"),
    "peak MiB": ("peak_mib", ",.0f"),
}
"""Further columns, from the rows' details: bytes of an export, milliseconds that a
runtime takes for an image, the most memory that the process held."""


def table(rows: Iterable[Row], names: Mapping[str, str], title: str = "") -> Table:
    """A row a model: what it is called, then its figures.

    Columns without a figure are left out.

    Args:
        rows: The rows.
        names: Headings of what models are called by, each with the field of `Row`.
        title: What stands above.
    """
    rows = list(rows)
    columns = [
        (name, [getattr(r, of) or "" for r in rows]) for name, of in names.items()
    ]
    figures = [
        (heading, [_figure(getattr(row, name), form) for row in rows])
        for heading, (name, form) in FIGURES.items()
    ] + [
        (heading, [_figure(row.details.get(name), form) for row in rows])
        for heading, (name, form) in DETAILS.items()
    ]
    made = Table(*names, title=plain(title) if title else None)
    figures = [(heading, cells) for heading, cells in figures if any(cells)]
    for heading, _ in figures:
        # An interval takes two lines before a name does.
        made.add_column(heading, justify="right", no_wrap=heading != GAIN)
    for cells in zip(*(cells for _, cells in [*columns, *figures]), strict=True):
        made.add_row(*map(plain, cells))
    return made


def show(
    made: Table,
    console: Console,
    spare: Iterable[str] = (ERROR,),
    files: str = "report.html",
) -> None:
    """Print a table without the columns that a narrow console has no room for.

    Else they would take the room from the names of rows.

    Args:
        made: As `table` makes it; it is changed.
        console: Where it goes.
        spare: The headings of columns that may be left out, in this order.
        files: Which files have all columns.
    """
    unlimited = console.options.update(width=sys.maxsize)
    columns = {str(column.header): column for column in made.columns}
    left_out: set[str] = set()
    for heading in (each for each in spare if each in columns):
        if Measurement.get(console, unlimited, made).maximum <= console.width:
            break
        made.columns.remove(columns[heading])
        left_out.add(heading)
    console.print(made)
    if left_out:
        named = ", ".join(heading for heading in columns if heading in left_out)
        line = f"no room for {named}: see {files}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _figure(value: float | Interval | None, form: str) -> str:
    # No iterations are nothing to show; any other zero is a figure.
    return "" if value is None or (form == "d" and not value) else written(value, form)


def written(value: float | Interval, form: str) -> str:
    """A figure in the form of its column, but for a distance that is no zero as 0.0000.

    Args:
        value: The figure.
        form: What `FIGURES` and `DETAILS` say.
    """
    text = format(value, form)
    return format(value, ".2g") if value and text == "0.0000" else text
