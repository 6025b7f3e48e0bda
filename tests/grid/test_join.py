"""Comparisons of several environments are one table, and none is lost in silence."""

import json

import pytest

from cora_plugin.adapters.errors import FileError
from cora_plugin.compare.html import Failed
from cora_plugin.compare.rows import Row
from cora_plugin.grid.join import join
from cora_plugin.grid.outputs import Comparison, write


def folder(path, toolkit, kl):
    path.mkdir()
    known = {"top1": None, "agreement": 1.0}
    rows = [
        Row(toolkit="torch", method="float", kl=0.0, **known),
        Row(toolkit=toolkit, method="none", kl=kl, equivalent_bits=4.0, **known),
    ]
    failed = [Failed(f"{toolkit}, series", "out of time")]
    result = Comparison(rows, failed, 1, {})
    write(result, path, "net, KL to float", {"model": {}}, {"torch": f"2 of {toolkit}"})
    return path


def test_rows_reasons_and_facts_of_every_folder(tmp_path):
    one = folder(tmp_path / "one", "brevitas", 0.1)
    two = folder(tmp_path / "two", "nncf", 0.2)
    joined = join(tmp_path / "all", [one, two, tmp_path / "three"])
    names = ["torch", "brevitas (one)", "nncf (two)"]
    assert [row.toolkit for row in joined.rows] == names
    assert [each.name for each in joined.failed] == [
        "one: brevitas, series",
        "two: nncf, series",
        "three",
    ]
    assert joined.left == 2
    whole = json.loads((tmp_path / "all" / "comparison.json").read_text())
    assert whole["facts"] == {"one: torch": "2 of brevitas", "two: torch": "2 of nncf"}
    page = (tmp_path / "all" / "report.html").read_text()
    assert page.count("<circle") == 2 and "no results in" in page
    assert "| nncf (two) " in (tmp_path / "all" / "comparison.md").read_text()


def test_no_results_at_all(tmp_path):
    with pytest.raises(FileError, match=r"no comparison.json in .*; run cora-plugin"):
        join(tmp_path / "all", [tmp_path / "one"])
    assert not (tmp_path / "all").exists()
