"""A report is one well-formed file that fetches nothing and escapes what it is told."""

import math
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from importlib.metadata import version

import pytest
from plain_host import PlainHost, quantized_copy
from small_net import batches, net

from cora_plugin import CoRa
from cora_plugin.compare.html import Failed, Page, html, write_html
from cora_plugin.compare.rows import Row
from cora_plugin.compare.scatter import Point, pareto, scatter
from cora_plugin.objective import TITLES

VOID = {"meta", "br", "img", "link", "input", "hr"}
NAMES = {"toolkit": "toolkit", "adapters": "method"}
EVIL = "<script>alert(\"1\")</script> & 'more'"


class Parsed(HTMLParser):
    """Elements that close in order, tables' rows, and everything that is linked."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tables, self.links, self.scripts = [], [], [], 0
        self.ids, self.titles = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.scripts += tag == "script"
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[k] for k in ("href", "src", "srcset") if k in values]

    def handle_startendtag(self, tag, attrs):
        pass  # Of SVG alone, which is parsed as XML.

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data
        if "circle" in self.open and self.open[-1] == "title":
            self.titles.append(data)


def row(toolkit="brevitas", kl=0.1, bits=4.0, **more):
    values = {"top1": None, "agreement": 0.5, "seconds": 1.0, **more}
    return Row(toolkit=toolkit, kl=kl, equivalent_bits=bits, **values)


def page(rows, **more):
    values = {"title": "title", "names": NAMES, "facts": {"torch": "2"}, **more}
    return Page(rows=rows, **values)


@pytest.fixture(scope="module")
def report():
    host = PlainHost(quantized_copy(net(), 3))
    return CoRa({"budget": 0.3, "regression": False}).apply(host, batches(2))


def test_a_whole_report_is_well_formed_and_fetches_nothing(report):
    rows = [
        row("torch", 0.0, 32.0),
        row(method=EVIL, details={"bytes": 10, "peak_mib": 7.0}),
        row("nncf", 0.02, 4.3, method="rrr"),
        row("nncf", math.nan, 4.2, method="nan"),
    ]
    more = {
        "layers": {EVIL: report},
        "failed": [Failed(EVIL, f"no {EVIL}")],
        "settings": EVIL,
        "notes": [EVIL],
    }
    text = html(page(rows, **more))
    parsed = Parsed(text)
    assert parsed.scripts == 1 and EVIL not in text
    assert all(link.startswith("#row-") for link in parsed.links)
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert "http" not in text.replace("http-equiv", "")
    models, failed, layers, facts = parsed.tables
    assert models[0][:5] == ["toolkit", "adapters", "agreement", "KL", "bits"]
    assert models[0][5:] == ["seconds", "bytes", "peak MiB"]
    assert models[2][1] == EVIL and models[4][3] == "nan"
    assert failed[1] == [EVIL, f"no {EVIL}"]
    assert [cells[0] for cells in layers[1:]] == [r.name for r in report.layers]
    assert facts == [["torch", "2"]]
    assert all(len(cells) == len(t[0]) for t in parsed.tables for cells in t)


def test_plots_are_xml_and_tell_rows_on_hover():
    rows = [row("torch", 0.0, 32.0), row(method=EVIL), row("nncf", 0.02, 4.3)]
    text = html(page(rows))
    start, end = text.index("<svg"), text.index("</svg>") + len("</svg>")
    plot = ElementTree.fromstring(text[start:end])
    circles = list(plot.iter("circle"))
    assert len(circles) == 2  # Not the float model's, whose KL is 0.
    assert circles[0].find("title").text.startswith(f"brevitas, {EVIL}")
    assert "KL 0.0200, bits 4.30" in circles[1].find("title").text
    assert {c.get("class") for c in circles} == {"series-0", "series-1"}
    for circle in circles:
        assert 0 < float(circle.get("cx")) < 640 and 0 < float(circle.get("cy")) < 380
    assert text.count("<svg") == 1  # No row has bytes.


def test_another_distance_is_plotted_by_its_name():
    values = {"top1": None, "agreement": None, "objective": "mse"}
    rows = [
        Row(distance=y, equivalent_bits=x, **values) for x, y in ((4, 0.2), (5, 0.1))
    ]
    text = html(page([Row(distance=0.0, equivalent_bits=32.0, **values), *rows]))
    assert text.count("<circle") == 2 and "distance 0.2" in text
    assert f"{TITLES['mse']} to float" in text and "KL" not in text


@pytest.mark.parametrize("rows", [[], [row()], [row("torch", 0.0, None)]])
def test_little_makes_no_empty_table_and_no_plot(rows):
    text = html(page(rows))
    assert "<svg" not in text
    for table in Parsed(text).tables:
        assert table and all(table)


def test_the_front_is_what_nothing_beats():
    def point(x, kl):
        return Point(x, kl, "", 0, "")

    best = [point(1, 3), point(2, 2), point(4, 1)]
    assert pareto([point(3, 2), *best[::-1], point(2, 4), point(4, 1)]) == best


@pytest.mark.parametrize("kl", [(1e-9, 10.0), (0.5, 0.5), (0.41, 0.43)])
def test_axes_hold_any_range(kl):
    points = [Point(4.0, value, "", i, "") for i, value in enumerate(kl)]
    plot = scatter(points, "title", "bits", "KL")
    assert plot.x_ticks and plot.y_ticks
    marks = [*plot.marks, *plot.x_ticks, *plot.y_ticks]
    assert all(0 <= m.x <= plot.width and 0 <= m.y <= plot.height for m in marks)


def test_the_machine_and_versions_stand_in_the_file(tmp_path):
    write_html(Page(title="t", rows=[row()], names=NAMES), tmp_path / "a.html")
    facts = dict(Parsed((tmp_path / "a.html").read_text("utf-8")).tables[-1])
    assert facts["torch"] == version("torch") and facts["CPU"]


CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser")), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_browser_renders_it(tmp_path):
    write_html(page([row(), row("nncf", 0.2)]), tmp_path / "a.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    shot = f"--screenshot={tmp_path / 'a.png'}"
    run = subprocess.run(
        [CHROMIUM, *flags, "--window-size=390,844", shot, f"file://{tmp_path}/a.html"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in run.stderr and (tmp_path / "a.png").stat().st_size > 1000
