"""The demo says what is missing before it works for minutes, and speaks alone."""

import sys

import pytest
from rich.console import Console

from cora_plugin.cli import main
from cora_plugin.progress import timed


@pytest.mark.parametrize(
    ("package", "extras"),
    [("nncf", "demo,nncf"), ("onnxruntime", "demo"), ("matplotlib", "demo")],
)
def test_an_absent_package_is_named_at_once(
    package, extras, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # Python's "there is none".
    assert main(["demo", "--toolkit", "brevitas,nncf"]) == 2
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
