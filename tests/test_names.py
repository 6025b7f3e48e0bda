"""Names of layers are taken and shown as they are, whatever characters are in them."""

import io

import pytest
from plain_host import PlainHost
from rich.console import Console
from small_net import batches
from torch import nn

from cora_plugin import CoRa, CoRaError
from cora_plugin.compare.rows import Row, table
from cora_plugin.layer import by_layer
from cora_plugin.progress import timed

ODD = ("a[0]", "a[1]", "[red]", "b*", "bc", "d?", "x$y$z", "e[/]")


@pytest.mark.parametrize("name", ODD)
def test_a_name_means_its_own_layer(name):
    assert by_layer("ranks", {name: 3}, ODD) == {name: 3}


def test_globs_mean_what_they_did():
    assert by_layer("ranks", {"b*": 1}, ("ba", "bc", "c")) == {"ba": 1, "bc": 1}
    assert by_layer("ranks", {"[ab]?": 1}, ("ba", "bc", "c")) == {"ba": 1, "bc": 1}
    # The last that fits wins, an exact name like any other.
    assert by_layer("ranks", {"b*": 1, "*": 2}, ("b*", "bc")) == {"b*": 2, "bc": 2}


def test_brackets_in_a_glob_may_be_those_of_names():
    layers = ("stage[0].conv", "stage[1].conv", "stage0.conv")
    found = by_layer("ranks", {"stage[1].*": 1}, layers)
    assert found == {"stage[1].conv": 1}
    # As a set of characters first, as ever.
    assert by_layer("ranks", {"stage[0].*": 1}, layers) == {"stage0.conv": 1}
    escaped = by_layer("ranks", {"stage[[]0].*": 1}, layers)
    assert escaped == {"stage[0].conv": 1}
    with pytest.raises(CoRaError, match=r"'stage\[2\]\.\*' fits no layer"):
        by_layer("ranks", {"stage[2].*": 1}, layers)


def net(names):
    made = nn.Sequential()
    for index, name in enumerate(names):
        made.add_module(name, nn.Conv2d(3 if not index else 8, 8, 3, padding=1))
    made.add_module("pool", nn.AdaptiveAvgPool2d(1))
    made.add_module("flat", nn.Flatten())
    return made.eval()


def first_column(text):
    """What stands in the first column of a table, without line breaks."""
    rows = [line.split("│") for line in text.splitlines() if line.startswith("│")]
    return "".join(cells[1].strip() for cells in rows)


def test_a_report_shows_and_pins_odd_and_long_names(tmp_path):
    long = "features" + "_and_more" * 20
    names = (*ODD, long)
    host = PlainHost(net(names))
    ranks = {"a[0]": 0, "b*": 2, "[red]": 3}
    report = CoRa({"budget": 0.5, "ranks": ranks}).apply(host, batches())
    found = {row.name: row.rank for row in report.layers}
    assert "a[0]" not in found
    assert (found["b*"], found["[red]"]) == (2, 3)
    text = str(report)
    assert all(name in text for name in ODD)
    assert long in first_column(text) and "…" not in text
    assert max(map(len, text.splitlines()[:40])) <= 108
    report.plot(tmp_path / "report.png")  # Between two $ matplotlib sees a formula.


def test_tables_of_models_show_names_as_they_are():
    rows = [Row(label="[red]net[/]", top1=None, agreement=0.5, kl=1.0)]
    stream = io.StringIO()
    console = Console(file=stream, width=60)
    console.print(table(rows, {"model": "label"}, "[bold] title"))
    assert "[red]net[/]" in stream.getvalue() and "[bold] title" in stream.getvalue()


def test_what_is_done_is_told_as_it_is():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60)
    assert timed(console, "exporting [red].onnx", lambda: 3)[0] == 3
    assert "exporting [red].onnx: 0 s" in stream.getvalue()
