"""Every combination once; a failure is a row's reason, and what is known is kept."""

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_recipe import written

from cora_plugin import CoRaError
from cora_plugin.adapters.errors import ConfigError, FileError
from cora_plugin.cli import main
from cora_plugin.document import Document
from cora_plugin.grid import compare
from cora_plugin.grid.cells import cells
from cora_plugin.grid.folder import Folder
from cora_plugin.grid.schedule import Limits, run_cells
from cora_plugin.grid.section import CORRECTED, CompareSection
from cora_plugin.integrations.latency import RUNTIMES, latency
from cora_plugin.integrations.toolkit import load_toolkit
from cora_plugin.recipe import Recipe, run


def recipe(tmp_path, lists, **sections):
    base = {"toolkit": "plain", "ptq": {}, "cora": {"regression": False}}
    data = {"factory": "small_recipe:images", "images": 24}
    whole = {**base, "data": data, "compare": lists, **sections}
    return written(tmp_path / "recipe.yaml", **whole)


def expanded(path, **known):
    document = Document.read(path)
    return cells(document, CompareSection.read(document), known, path.parent)


def test_every_combination_is_a_recipe_and_none_comes_twice(plain, tmp_path):
    lists = {
        "toolkits": ["plain", "absent"],
        "recipes": ["ptq", "coarse"],
        "weight_bits": [3, 4, 3],
        "methods": ["none", CORRECTED, "svd uniform", "series"],
        "budgets": [0.1, "0.2 bits"],
        "ptq": {"absent": {"act_range": "mse"}},
    }
    found = expanded(recipe(tmp_path, lists), plain=plain, absent="not installed")
    # Only "svd uniform" has a budget.
    assert len(found) == 2 * 2 * 2 * (3 + 2)
    assert len({cell.name for cell in found}) == len(found)
    by_title = {cell.title: cell for cell in found}
    cell = by_title["plain, coarse, W3A8, svd uniform, 0.2 bits, seed 0"]
    assert cell.values["ptq"] == {"coarse": True, "weight_bits": 3, "act_bits": 8}
    assert cell.values["cora"]["budget"] == "0.2 bits"
    assert cell.values["cora"]["metric"] == "svd"
    corrected = by_title[f"absent, ptq, W4A8, {CORRECTED}, seed 0"]
    assert corrected.values["cora"] is False and corrected.absent
    assert corrected.values["ptq"]["bias_correction"]
    assert corrected.values["ptq"]["act_range"] == "mse"
    for each in found:
        if not each.absent:
            Recipe.of(Document("cell", dict(each.values)))


def test_more_bits_come_with_biases_corrected_and_without(plain, tmp_path):
    methods = ["one up", "one up uncorrected", "two up", "two up uncorrected"]
    path = recipe(tmp_path, {"methods": methods, "budgets": [0.1, 0.2]})
    found = {cell.method: cell.values for cell in expanded(path, absent="a plain host")}
    for method, bits in zip(methods, (5, 5, 6, 6), strict=True):
        ptq = found[method]["ptq"]
        assert ptq["weight_bits"] == bits
        assert ptq["bias_correction"] is ("uncorrected" not in method)
        assert found[method]["cora"] is False


def test_cells_without_adapters_are_judged_as_those_with_them(plain, tmp_path):
    cora = {"objective": "mse", "axis": 1, "damping": 1e-3}
    path = recipe(tmp_path, {"methods": ["none", "default"]}, cora=cora)
    none, default = expanded(path, plain=plain)
    assert none.values["cora"] is False and default.values["cora"]["damping"] == 1e-3
    assert none.values["test"] == {"objective": "mse", "axis": 1}
    results = run(Recipe.of(Document("cell", dict(none.values))))
    assert results.rows[-1].objective == "mse" and results.rows[-1].distance > 0


def test_a_cells_hash_is_of_all_that_measures_it(plain, tmp_path):
    def keys(**sections):
        path = recipe(tmp_path, {"methods": ["none"]}, **sections)
        return [cell.key for cell in expanded(path, plain=plain)]

    assert keys() == keys(output="elsewhere")
    assert keys() != keys(test={"images": 3})


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"toolkits": ["plane"]}, "unknown toolkit 'plane'; did you mean plain?"),
        ({"methods": ["rrr spectra"]}, "did you mean rrr spectral?"),
        ({"recipes": ["coarser"]}, "unknown PTQ recipe 'coarser'; did you mean coarse"),
        ({"method": ["none"]}, "compare: unknown key 'method'; did you mean methods?"),
        ({"weight_bits": [4, 1]}, "compare.weight_bits.1: 1 is out of range"),
        ({"budgets": ["much"]}, "compare.budgets: 'much'"),
        ({"methods": []}, "compare.methods: an empty list"),
        ({"ptq": {"plain": {"coarser": 1}}}, "unknown key 'coarser'"),
        ({"methods": ["none", "bits"]}, "'bits' plans bit widths, which needs a total"),
        ({"seeds": [*range(80)]}, "160 cells of up to 60 minutes each are more than"),
    ],
)
def test_wrong_lists_are_refused_before_anything_runs(plain, tmp_path, lists, message):
    path = recipe(tmp_path, lists)
    with pytest.raises(ConfigError) as raised:
        compare(path)
    assert message in str(raised.value) and str(raised.value).startswith(str(path))
    assert not (tmp_path / "out").exists()


def test_settings_of_adapters_are_looked_at_where_the_first_cells_have_none(
    plain, tmp_path
):
    path = recipe(tmp_path, {"methods": ["none", "default"]}, cora={"dampning": 1})
    with pytest.raises(ConfigError, match="cora: unknown key 'dampning'"):
        compare(path)
    assert not (tmp_path / "out").exists()


def test_settings_of_adapters_are_looked_at_with_each_budget(plain, tmp_path):
    lists = {"methods": ["none", "default"], "budgets": ["1.05 ptq", 0.05]}
    path = recipe(tmp_path, lists, cora={"menu": [3, 4, 8]})
    with pytest.raises(ConfigError, match="is no total; bit widths"):
        compare(path)
    assert not (tmp_path / "out").exists()


def test_bit_widths_are_planned_in_those_budgets_that_are_totals(plain, tmp_path):
    lists = {"methods": ["svd uniform", "bits"], "budgets": [0.1, "1.1 ptq"]}
    found = expanded(recipe(tmp_path, lists), plain=plain)
    assert [(cell.method, cell.budget) for cell in found] == [
        ("svd uniform", "0.1"),
        ("svd uniform", "1.1 ptq"),
        ("bits", "1.1 ptq"),
    ]


def test_a_check_of_many_cells_says_that_they_need_yes(plain, tmp_path):
    text = io.StringIO()
    path = recipe(tmp_path, {"seeds": [*range(80)]})
    compare(path, only_check=True, console=Console(file=text))
    assert "160 cells, ready to run with --yes" in text.getvalue()


def test_a_narrow_console_shows_what_rows_are_called(plain, tmp_path):
    path = recipe(tmp_path, {"methods": ["svd uniform"]})
    for width, shown in ((80, False), (200, True)):
        text = io.StringIO()
        compare(path, console=Console(file=text, width=width))
        table, _, left_out = text.getvalue().partition("no room for")
        assert " svd uniform " in table and " KL " in table
        assert (" seconds " in table) is shown
        assert ("seconds" in left_out) is not shown


def test_a_recipe_without_lists_says_how_they_look(plain, tmp_path):
    path = written(tmp_path / "recipe.yaml", toolkit="plain", ptq={})
    with pytest.raises(ConfigError, match="compare: nothing to compare; list"):
        compare(path)


def test_a_comparison_with_failures_goes_on_where_it_stopped(plain, tmp_path, capsys):
    lists = {
        "toolkits": ["plain", "absent"],
        "weight_bits": 3,
        "methods": ["none", "svd uniform"],
        # The latter is less than the weights alone take.
        "budgets": [0.3, "0.1 ptq"],
    }
    path = recipe(tmp_path, lists, exports=["weights"])
    out = tmp_path / "out"
    assert main(["compare", str(path), "--jobs", "3"]) == 0
    said = capsys.readouterr().out
    assert "[3/3]" in said
    written_ = json.loads((out / "comparison.json").read_text())
    reference, none, adapted = written_["rows"]
    assert reference["toolkit"] == "torch" and reference["kl"] == 0
    assert (none["method"], adapted["method"]) == ("none", "svd uniform")
    assert adapted["kl"] < none["kl"]
    assert 3 < none["equivalent_bits"] < adapted["equivalent_bits"]
    assert none["bytes"] > 0 and none["peak_mib"] > 0
    for row, other in ((none, reference), (adapted, none)):
        gain, difference = row["gain"], row["top1"] - other["top1"]
        assert gain["low"] <= gain["value"] <= gain["high"]
        assert gain["value"] == pytest.approx(difference)
        assert "right" not in row
    reasons = [each["reason"] for each in written_["failed"]]
    assert len(reasons) == 4 and "ptq" in reasons[0]
    assert all(r.startswith("not installed: absent needs") for r in reasons[1:])
    assert written_["left"] == 0
    page = (out / "report.html").read_text()
    assert "Not measured" in page and page.count("<circle") == 4  # Bits and bytes.
    table = (out / "comparison.md").read_text()
    assert table.count("| plain ") == 2 and "not installed" in table
    assert "Δ top-1 [95 %]" in table and "Δ top-1 [95 %]" in page

    # One outcome is cut off in the middle, as by a crash: it alone is measured again.
    outcomes = [p for p in (out / "cells").glob("*.json") if "none" in p.name]
    times = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    outcomes[0].write_text('{"row": ')
    assert main(["compare", str(path)]) == 0
    said = capsys.readouterr().out
    assert "2 of 6 cells are measured already; 1 have failed, which --retry" in said
    assert "[1/1]" in said
    changed = [p for p, time in times.items() if p.stat().st_mtime_ns != time]
    assert changed == outcomes
    again = json.loads((out / "comparison.json").read_text())["rows"]
    assert [row["kl"] for row in again] == [row["kl"] for row in written_["rows"]]

    # Another recipe's results are left alone.
    other = recipe(tmp_path, lists, exports=["weights"], test={"images": 8})
    with pytest.raises(FileError, match="of another recipe, which differs in test"):
        compare(other)
    assert json.loads((out / "comparison.json").read_text())["rows"] == again


def one_cell(plain, tmp_path, **sections):
    path = recipe(tmp_path, {"methods": ["none"]}, **sections)
    folder = Folder(tmp_path / "out")
    (cell,) = expanded(path, plain=plain)
    with folder.opened(Document.read(path)):
        return folder, cell


def run_one(folder, cell, *limits):
    told = []
    end = Limits(*limits)
    run_cells([cell], folder, 1, end, lambda _: None, lambda r, n: told.append(r))
    assert told == [[cell], []]
    return folder.outcome(cell)["reason"]


def test_a_cell_out_of_time_says_so(plain, tmp_path):
    assert "out of time" in run_one(*one_cell(plain, tmp_path), 1e-3)


def test_a_cell_out_of_memory_says_so(plain, tmp_path):
    # The interpreter and torch alone hold more.
    reason = run_one(*one_cell(plain, tmp_path), 10, 0.05)
    assert reason.startswith("out of memory at 0.")
    # A failed cell stays so until it is asked for.
    assert reason.endswith("raise compare.gib and pass --retry")


def test_two_comparisons_do_not_write_to_one_folder(plain, tmp_path):
    path = recipe(tmp_path, {"methods": ["none"]})
    with Folder(tmp_path / "out").opened(Document.read(path)):
        with pytest.raises(FileError, match="another comparison is writing to"):
            compare(path)
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_the_time_of_a_run_is_part_of_a_cell(plain, tmp_path):
    def cell(**lists):
        path = recipe(tmp_path, {"methods": ["none"], **lists})
        return expanded(path, plain=plain)[0]

    assert cell(latency="openvino").key != cell().key
    with pytest.raises(ConfigError, match="'tflite' is not onnxruntime or openvino"):
        cell(latency="tflite")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_run_takes_milliseconds(runtime, tmp_path):
    pytest.importorskip(runtime)
    net, x = torch.nn.Conv2d(3, 8, 3), torch.randn(1, 3, 16, 16)
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), path, dynamo=False)
    assert 0 < latency(runtime, path, x.numpy()) < 1000
    with pytest.raises(CoRaError, match=r"does not run net\.safetensors"):
        latency(runtime, tmp_path / "net.safetensors", x.numpy())


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_process_that_dies_says_where_its_log_is(plain, tmp_path):
    deadly = "import os, signal\ndef net(): os.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "installed" / "deadly.py").write_text(deadly)
    folder, cell = one_cell(plain, tmp_path, model={"factory": "deadly:net"})
    assert "ended by SIGKILL" in run_one(folder, cell, 10)


def test_ctrl_c_leaves_no_process_and_no_outcome(plain, tmp_path):
    folder, cell = one_cell(plain, tmp_path)

    def interrupt(running, left):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], folder, 1, Limits(10), lambda _: None, interrupt)
    assert folder.outcome(cell) is None and folder.recipe_path(cell).exists()


def test_nothing_measured_is_an_error(plain, tmp_path):
    path = recipe(tmp_path, {"toolkits": ["absent"]}, toolkit="absent")
    with pytest.raises(CoRaError, match="no cell could be measured"):
        compare(path)
    assert "not installed" in (tmp_path / "out" / "comparison.md").read_text()


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_jobs_is_a_number(jobs):
    with pytest.raises(SystemExit):
        main(["compare", "recipe.yaml", "--jobs", jobs])


def test_every_key_is_explained():
    docs = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    assert [
        n for n in CompareSection.__dataclass_fields__ if f"`{n}`" not in docs
    ] == []


@pytest.mark.skipif(find_spec("brevitas") is None, reason="needs brevitas")
@pytest.mark.parametrize(
    ("name", "number"),
    [("compare-lite0", 2 * 2 * (2 + 3 * 2)), ("compare-peers", 2 * 13)],
)
def test_the_ready_comparisons_can_be_expanded(name, number):
    path = Path(__file__).parents[2] / "docs" / "recipes" / f"{name}.yaml"
    brevitas = load_toolkit("brevitas")
    found = expanded(path, brevitas=brevitas, nncf="not installed")
    assert len(found) == number
    for cell in found:
        Recipe.of(Document("cell", dict(cell.values)))
