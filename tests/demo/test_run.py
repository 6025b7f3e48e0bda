"""The demo runs, says what is missing before it works for minutes, and speaks alone."""

import json
import sys
from importlib.util import find_spec

import pytest
from rich.console import Console

from cora_plugin.cli import main
from cora_plugin.demo import run_demo
from cora_plugin.progress import timed


@pytest.mark.parametrize(
    ("package", "extras"),
    [("nncf", "demo,nncf"), ("onnxruntime", "demo"), ("matplotlib", "demo")],
)
def test_an_absent_package_is_named_at_once(
    package, extras, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    for name in [*sys.modules]:  # What an earlier test has imported.
        if name.startswith(f"cora_plugin.integrations.{package}"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # Python's "there is none".
    assert main(["demo", "--toolkit", "nncf,brevitas"]) == 2
    error = capsys.readouterr().err
    assert f"the demo needs the package {package}, which is not installed" in error
    assert f'pip install "cora-plugin[{extras}]"' in error
    assert list(tmp_path.iterdir()) == []


def test_only_the_demo_speaks(capfd):
    def work():
        sys.stdout.write("a toolkit's progress")
        sys.stderr.write("a toolkit's warning")
        return 7

    assert timed(Console(file=sys.stdout), "working", work)[0] == 7
    assert capfd.readouterr() == ("working: 0 s\n", "")


@pytest.mark.skipif(find_spec("brevitas") is None, reason="needs brevitas")
def test_a_small_form_of_the_demo(tmp_path, capsys):
    """The real network and the whole way, on a few small images."""
    rows = run_demo(
        tmp_path / "out",
        "budget=0.05,metric=qera-exact,sensitivity_images=4",
        methods=["svd uniform"],
        calibration_count=8,
        crops_per_photo=1,
        size=64,
        menu=(4, 8),
    )
    title = "Brevitas W4A8"
    svd, asked = "+ svd uniform", "+ qera-exact spectral"
    planned = "+ widths and adapters in the bits of PTQ"
    labels = ["float", title, f"{title}, biases corrected", svd, planned, asked]
    assert [row.label for row in rows] == labels
    reference, plain, corrected, _, same_size, adapted = rows
    assert same_size.equivalent_bits <= plain.equivalent_bits * (1 + 1e-9)
    assert same_size.kl < min(plain.kl, corrected.kl)
    assert reference.kl == 0 and reference.agreement == 1
    assert plain.kl > 2 * adapted.kl
    assert plain.equivalent_bits < adapted.equivalent_bits < 6
    said = capsys.readouterr().out
    assert "20 crops" in said and all(label in said for label in (title, svd, asked))
    assert "torch's class for" in " ".join(said.split())
    files = {path.name for path in (tmp_path / "out").iterdir()}
    of_toolkit = {f"lite0-brevitas{end}" for end in (".onnx", ".json", ".png")}
    assert files == {"report.html", *of_toolkit}
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(label in page for label in labels)
    assert page.count('href="#row-') == 5 and "Bit widths, best first" in page
    report = json.loads((tmp_path / "out" / "lite0-brevitas.json").read_text())
    assert report["equivalent_bits"] == adapted.equivalent_bits
