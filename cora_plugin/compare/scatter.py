"""A plot of rows as SVG: a size against the distance, and the Pareto front.

The SVG has no script and no colours of its own: a page's style sheet colours `front`,
`axis` and `series-0` to `series-5`. Each point is a link to its row of a table with the
row's words as its title, which a browser shows on hover.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 14, 46
FRONT = "joins what no other model beats"
SERIES = 6
"""Colours that a page has; further groups begin again with the first."""


@dataclass(frozen=True)
class Point:
    """A row of a plot: where it is, its group, its number and what hover tells.

    `x` is the size, `y` the distance to float; less is better of both, and `y` is more
    than 0, as its axis is logarithmic.
    """

    x: float
    y: float
    group: str
    row: int
    text: str


@dataclass(frozen=True)
class Mark:
    """A point or a tick in pixels; `css` names its colour."""

    x: float
    y: float
    text: str = ""
    row: int = 0
    css: str = ""


@dataclass(frozen=True)
class Scatter:
    """A plot in pixels, as the page's template draws it."""

    title: str
    axis: str
    distance: str
    caption: str
    table: str
    marks: Sequence[Mark]
    line: str
    x_ticks: Sequence[Mark]
    y_ticks: Sequence[Mark]
    legend: Sequence[Mark]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both size and distance, by size."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not best or point.y < best[-1].y:
            best.append(point)
    return best


def scatter(
    points: Sequence[Point],
    title: str,
    axis: str,
    distance: str,
    curve: Sequence[tuple[float, float]] = (),
    caption: str = FRONT,
    table: str = "row",
) -> Scatter | None:
    """Lay out a plot.

    Args:
        points: What it shows.
        title: What it is called.
        axis: What its horizontal axis counts.
        distance: What its vertical axis measures.
        curve: Sizes and distances that the dashed line joins; none: the Pareto front.
        caption: What the dashed line is.
        table: What the ids of the table's rows begin with.

    Returns:
        The plot; None for fewer than two points, which compare nothing.
    """
    if len(points) < 2:
        return None
    places = [*((p.x, p.y) for p in points), *curve]
    lows, highs = _decades([y for _, y in places])
    least, most = min(x for x, _ in places), max(x for x, _ in places)
    room = (most - least or abs(most) or 1.0) * 0.06
    least, most = least - room, most + room

    def x_of(value: float) -> float:
        share = (value - least) / (most - least)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y_of(value: float) -> float:
        share = (math.log10(value) - lows) / (highs - lows)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    groups = list(dict.fromkeys(p.group for p in points))
    css = {group: f"series-{i % SERIES}" for i, group in enumerate(groups)}
    marks = [Mark(x_of(p.x), y_of(p.y), p.text, p.row, css[p.group]) for p in points]
    steps = curve or [(p.x, p.y) for p in pareto(points)]
    return Scatter(
        title,
        axis,
        distance,
        caption,
        table,
        marks,
        line=" ".join(f"{x_of(x)},{y_of(y)}" for x, y in steps),
        x_ticks=[
            Mark(x_of(v), HEIGHT - BOTTOM, f"{v:.5g}") for v in _even(least, most)
        ],
        y_ticks=[Mark(LEFT, y_of(v), f"{v:.3g}") for v in _log_ticks(lows, highs)],
        legend=[Mark(0, 0, group, css=css[group]) for group in groups if group],
    )


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis with some room around the values."""
    lows, highs = math.log10(min(values)), math.log10(max(values))
    room = max(0.08 * (highs - lows), 0.1)
    return lows - room, highs + room


def _log_ticks(lows: float, highs: float) -> list[float]:
    """1, 2 and 5 of each decade within; powers of ten alone where they are many."""
    digits = (1,) if highs - lows > 3 else (1, 2, 5)
    decades = range(math.floor(lows), math.ceil(highs) + 1)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    inside = [tick for tick in ticks if lows <= math.log10(tick) <= highs]
    return inside or [10 ** ((lows + highs) / 2)]


def _even(least: float, most: float) -> list[float]:
    """About five round numbers within."""
    raw = (most - least) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * d for d in (1, 2, 5, 10) if power * d >= raw)
    first = math.ceil(least / step)
    return [round(i * step, 10) for i in range(first, math.floor(most / step) + 1)]
