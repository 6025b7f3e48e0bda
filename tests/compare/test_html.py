"""A report is one well-formed file that fetches nothing and escapes what it is told."""

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image
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
PHONE, DESK = 390, 1200

# Chromium's own windows are wider than a phone, so the page is in a frame.
FRAME = """<body style="margin:0"><output></output>
<iframe src="page.html" style="width:{width}px;height:2000px;border:0"></iframe>
<script>addEventListener("message", (e) => {{
  document.querySelector("output").textContent = e.data; }})</script></body>"""

PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  width: innerWidth, wide: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  broken: [...document.images].filter((e) => !e.naturalWidth).length,
  empty: [...document.querySelectorAll("tbody")].filter(
    (e) => !e.innerText.trim()).length,
  plots: [...document.querySelectorAll("svg")].filter(
    (e) => e.clientHeight > 99).length,
  sorts: document.querySelectorAll("th button").length,
  text: parseFloat(getComputedStyle(document.querySelector("svg text")).fontSize)
    * document.querySelector("svg").clientWidth / 640,
}), "*"))</script></body>"""


NO_SCRIPTS = (
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"script-src 'none'; script-src-attr 'none'\">"
)


def browsed(path, *flags, width=DESK, silent=True):
    """What Chromium prints for a page; its console must speak or be `silent`."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={path.parent / 'profile'}"]
    command += ["--enable-logging=stderr", f"--window-size={max(width, 500)},2000"]
    run = subprocess.run(
        [*command, *flags, path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert silent == ("CONSOLE" not in run.stderr)
    return run.stdout


def picture(path, *flags, width=DESK, silent=True):
    """A page as Chromium shows it, [height, width, 3]."""
    shot = path.with_suffix(".png")
    browsed(path, *flags, f"--screenshot={shot}", width=width, silent=silent)
    with Image.open(shot) as found:
        return np.asarray(found.convert("RGB"))[:, :width]


def opened(folder, text, width, dark):
    """What a page says of itself in a browser, and its picture."""
    (folder / "page.html").write_text(text.replace("</body>", PROBE), "utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width), "utf-8")
    flags = ["--force-dark-mode"] if dark else []
    printed = browsed(frame, *flags, "--dump-dom", width=width)
    found = re.search("<output>(.*)</output>", printed)
    return json.loads(unescape(found[1])), picture(frame, *flags, width=width)


def pages(report):
    """A comparison, and what a run and the demo write, which is the same page."""
    rows = [
        row("torch", 0.0, 32.0),
        row(kl=0.3, method="none", details={"bytes": 4_000_000, "ms": 2.0}),
        row(
            "nncf", 0.02, 4.3, method="x" * 60, details={"bytes": 5_000_000, "ms": 3.0}
        ),
    ]
    failed = [Failed("nncf", "out of time " * 20)]
    more = {"failed": failed, "layers": {"brevitas": report}, "settings": "a: " * 90}
    yield page(rows, **more)
    named = [replace(each, label=f"model {i}") for i, each in enumerate(rows)]
    yield page(named, names={"model": "label"}, layers={"adapters": report})


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it(report, tmp_path, width, dark):
    compared, run = map(html, pages(report))
    # Each page and each look once in light and dark, at a phone's width and a desk's.
    text = compared if dark == (width == PHONE) else run
    found, pixels = opened(tmp_path, text, width, dark)
    assert found["width"] == width and found["dark"] == dark
    assert found["wide"] <= width  # What is wider scrolls by itself.
    assert found["broken"] == found["empty"] == 0
    assert found["plots"] == 3 and found["sorts"] > 10
    assert found["text"] > 9  # Pixels.
    paper = np.median(pixels[:1500], axis=(0, 1))
    assert (paper < 60).all() if dark else (paper > 200).all()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_without_scripts_as_much_is_there(report, tmp_path):
    text = next(map(html, pages(report)))
    whole, bare = tmp_path / "whole.html", tmp_path / "bare.html"
    whole.write_text(text, "utf-8")
    bare.write_text(text.replace("<head>", f"<head>{NO_SCRIPTS}"), "utf-8")
    ink = (picture(whole) < 200).mean()
    # The console tells that scripts are forbidden.
    left = (picture(bare, silent=False) < 200).mean()
    assert ink > 0.01 and left == pytest.approx(ink, rel=0.1)
