"""Pages have the figures that the benchmarks wrote, and no others."""

import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import small_recipe
import torch
from torch import nn

from cora_plugin.adapters.errors import FileError
from cora_plugin.compare.rows import Row
from cora_plugin.compare.task import Task

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
SEARCHES = sorted((BENCHMARKS / "searches").glob("*.json"))
COMPARISONS = SEARCHES + [
    path
    for path in RESULTS
    if path.stem.split("-")[0] in ("accuracy", "demo", "peers", "rounding")
]
DETAILS = {"depthwise_bits", "act_range", "search_seconds", "steps", "kl_digits"}
"""What the benchmarks know of a row beside its own figures."""
BASE = ("none", "int8 ONNX")
"""What the latencies of exported files are relative to."""
PAGE = "<!-- figures: cost lite0-W4A8-brevitas -->\n<!-- end -->\n"
PROSE = "<!-- figures: text {} -->\n<!-- end -->"


@pytest.fixture
def readme(monkeypatch):
    # The benchmarks are scripts, not a package.
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("readme")


def test_every_page_is_up_to_date(readme, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        readme.main()
    assert not stopped.value.code, capsys.readouterr().out


def test_a_page_with_another_figure_is_written_anew(
    readme, monkeypatch, tmp_path, capsys
):
    made = readme.filled(PAGE)
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"\| search \| \S+ \|", "| search | 99 |", made))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PAGES", ["page.md"])
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    with pytest.raises(SystemExit) as stopped:
        readme.main()
    assert stopped.value.code == 1
    assert page.read_text() != made
    monkeypatch.setattr("sys.argv", ["readme.py"])
    with pytest.raises(SystemExit) as stopped:
        readme.main()
    assert not stopped.value.code
    assert page.read_text() == made
    assert "page.md: would change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace("cost", "costs"), "no figures are called 'costs'"),
        (PAGE.replace("lite0", "lite1"), "cost-lite1-W4A8-brevitas.json"),
        (PAGE.replace("<!-- end -->", ""), "1 comments ask for figures, 0 end"),
        (PAGE.splitlines()[0] + "\n" + PAGE, "2 comments ask for figures, 1 end"),
        (PROSE.format("{lite0-W4A8/ninth/kl:.2f}"), "no row is 'ninth'"),
        (PROSE.format("{kl}"), "{kl} is no figure"),
    ],
    ids=["table", "file", "end", "two", "row", "figure"],
)
def test_what_cannot_be_filled_is_an_error(readme, page, message):
    with pytest.raises(FileError, match=message):
        readme.filled(page)


def test_every_table_of_results_is_made(readme):
    page = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    by_hand = readme.BLOCK.sub("", page).splitlines()
    tables = [line for line in by_hand if line.strip().startswith("|")]
    assert tables[0].startswith("| network | data |")
    assert len(tables) == 5  # The networks, which nothing measures.


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_rows_are_those_of_a_comparison(path):
    names = set()
    for values in json.loads(path.read_text()):
        row = Row.of(values)
        assert set(row.details) <= DETAILS
        assert row.kl >= 0
        for share in (row.top1, row.agreement):
            assert share is None or 0 <= share <= 1
        if row.label is None:
            assert f"{row.model}-{row.weights}" in path.stem
        names.add((row.label, row.recipe, row.method, row.budget))
    assert len(names) == len(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "path", [p for p in RESULTS if p not in COMPARISONS], ids=lambda path: path.stem
)
def test_other_results_say_what_they_are_of(path):
    found = json.loads(path.read_text())
    kind, *about = path.stem.split("-")
    CHECKS[kind](found)
    assert kind != "formats" or found["model"] == about[0]


def check_exports(found):
    files = {(row["adapters"], row["format"], row["runtime"]): row for row in found}
    assert len(files) == len(found)
    bases = [row for key, row in files.items() if key[:2] == BASE]
    assert [row["ratio"]["1"] for row in bases] == [1, 1]


def check_formats(found):
    assert all(f["adapted_bytes"] > f.get("bytes", 0) for f in found["files"])


def check_budgets(found):
    rows = {(r["method"], r["budget"]): r for r in found if r["recipe"] != "one up+bc"}
    plain = next(row for row in found if row["recipe"] == "ptq")
    one_up = rows["none", ""]
    assert one_up["recipe"] == "one up"
    assert one_up["equivalent_bits"] > plain["equivalent_bits"] + 0.5
    for times in (1.0, 1.3):
        together = rows["together", f"{times} ptq"]
        limit = times * plain["equivalent_bits"] * (1 + 1e-9)
        assert together["equivalent_bits"] <= limit
        assert together["kl"] < plain["kl"]
        assert rows["bits", f"{times} ptq"]["equivalent_bits"] <= limit
    assert ("adapters", "1.0 ptq") not in rows
    assert rows["adapters", "1.3 ptq"]["kl"] < plain["kl"]
    assert rows["series", ""]["kl"] < plain["kl"]


def check_cost(found):
    about = ("model", "toolkit", "float_pass_seconds", "peak_bytes", "passes")
    stages = sum(passes for name, passes in found.items() if name not in about)
    assert 0 < stages <= found["passes"]


def check_growth(found):
    for row in found:
        assert row["layers"] >= 2 and row["peak_bytes"] > 0 < row["float_pass"]
        assert 0 < sum(row["stages"].values()) <= row["seconds"]


def check_measured_budgets(found):
    rows = {(row["recipe"], row["method"], row["budget"]): row for row in found}
    together = [r for (_, method, _), r in rows.items() if method == "together"]
    assert together
    plain = next(r for k, r in rows.items() if "none" in k and "one up" not in k)
    for row in together:
        times = float(row["budget"].removesuffix(" ptq"))
        limit = times * plain["equivalent_bits"]
        assert row["equivalent_bits"] <= limit * (1 + 1e-9)


def check_tasks(found):
    rows = {(row["recipe"], row["method"]): row for row in found}
    ways = [("ptq", "none"), ("ptq+bc", "none"), ("ptq+bc", "default")]
    assert list(rows) == [("float", "none"), *ways]
    assert rows["float", "none"]["distance"] == 0
    peers = min(rows[way]["distance"] for way in ways[:2])
    assert rows[ways[2]]["distance"] < peers
    for row in found:
        assert row["objective"] == rows[ways[0]]["objective"]
        assert row["unit"] in ("dB", "top-1", "accuracy") and row["measured"] > 0


def check_int8(found):
    """A runtime that computes what the file says is as near as torch."""
    rows = [row for row in found if row["adapters"] == "5%"]
    assert [row["runtime"] for row in rows] == ["onnxruntime", "openvino"]
    for row in rows:
        assert row["kl_float"] <= 1.1 * row["kl_of_torch"]


def check_seeds(found):
    rows = {(row["method"], row["seed"]): row for row in found}
    seeds = {seed for _, seed in rows}
    methods = {method for method, _ in rows}
    assert methods == {"none", "rrr spectral", "8 bits", "8 bits+bc"}
    assert len(rows) == len(found) == len(seeds) * len(methods)
    for seed in seeds:
        ours, peer = rows["rrr spectral", seed], rows["8 bits+bc", seed]
        assert peer["equivalent_bits"] <= ours["equivalent_bits"]


def _drawn(row):
    return row["toolkit"], row["label"]


def check_compared(found):
    """Methods of a budget end within it, and seeds are of the same methods."""
    rows = [row for row in found["rows"] if row["toolkit"] != "torch"]
    plain = {_drawn(r): r["equivalent_bits"] for r in rows if r["method"] == "none"}
    assert {toolkit for toolkit, _ in plain} == {"brevitas", "nncf"}
    for row in rows:
        if row["budget"] == "1.05 ptq":
            assert row["equivalent_bits"] <= 1.05 * plain[_drawn(row)] * (1 + 1e-9)
    by_seed = Counter(row["label"] for row in rows)
    assert len(set(by_seed.values())) == 1


CHECKS = {
    "int8": check_int8,
    "compared": check_compared,
    "seeds": check_seeds,
    "tasks": check_tasks,
    "budget": check_measured_budgets,
    "exports": check_exports,
    "formats": check_formats,
    "cost": check_cost,
    "growth": check_growth,
}


SHORT = {
    "budget": "--toolkit=brevitas --times=1.0,1.3 --menu=3/4/6",
    "cost": "--toolkit=brevitas --cora=budget=0.3",
    "exports": "--toolkit=brevitas --budgets=0.3 --formats= --batches=1 --rounds=1",
    "formats": "--cora=budget=0.3 --images=2",
    "search": "--toolkit=brevitas --budgets=0.3 --methods=rrr+spectral",
}
"""Flags with which the benchmarks of one network take seconds; + stands for a space."""


@pytest.mark.parametrize("name", SHORT)
def test_benchmarks_measure_a_small_network(name, monkeypatch, tmp_path):
    for package in ("brevitas", "onnxruntime", "openvino", "qonnx"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module(name)
    inputs = small_recipe.unlabelled(), *small_recipe.images()
    # The zoo's networks take minutes, and their images are no part of the repository.
    task = Task("small", small_recipe.net(), *inputs)
    monkeypatch.setattr(benchmark, "load", lambda name, seed=0: task)
    flags = [flag.replace("+", " ") for flag in SHORT[name].split()]
    path = tmp_path / "measured.json"
    flags += ["--weight-bits=3", f"--json={path}"]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *flags])
    benchmark.main()
    found = json.loads(path.read_text())
    if name == "search":
        kl = {row["method"]: row["kl"] for row in found}
        assert list(kl) == ["none", "rrr spectral", "8 bits", "8 bits+bc"]
        assert kl["rrr spectral"] < 0.5 * kl["none"]
        return
    if name == "budget":
        check_budgets(found)
        return
    CHECKS[name](found)
    if name == "exports":
        assert {row["adapters"] for row in found} == {"float", "none", "30%"}
        assert all(row["agreement"] > 0.9 for row in found)
    if name == "formats":
        assert all(file.get("agreement", 1) == 1 for file in found["files"])


def test_growth_is_measured_in_sizes(monkeypatch, tmp_path, capsys):
    pytest.importorskip("brevitas")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("growth")
    monkeypatch.setattr(benchmark, "BASE", {"layers": 2, "width": 8, "images": 32})
    monkeypatch.setattr(benchmark, "SIZES", {"layers": (2, 3)})
    path = tmp_path / "measured.json"
    monkeypatch.setattr("sys.argv", ["growth.py", f"--json={path}"])
    benchmark.main()
    found = json.loads(path.read_text())
    check_growth(found)
    assert [row["layers"] for row in found] == [2, 3]
    assert capsys.readouterr().out.startswith("| layers | width | images |")


def test_tasks_measure_a_small_network(monkeypatch, tmp_path):
    pytest.importorskip("brevitas")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("tasks")
    jobs = importlib.import_module("zoo.jobs")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 3, 4, stride=2, padding=1),
    ).eval()
    x = torch.rand(48, 3, 12, 12)
    job = jobs.Job("small", net, x, x[:16], measure=jobs.psnr(x[:16]), unit="dB")
    monkeypatch.setattr(benchmark, "load", {"small": lambda: job})
    path = tmp_path / "measured.json"
    flags = ["--task=small", "--toolkit=brevitas", "--budgets=0.3", f"--json={path}"]
    monkeypatch.setattr("sys.argv", ["tasks.py", *flags])
    benchmark.main()
    check_tasks(json.loads(path.read_text()))
