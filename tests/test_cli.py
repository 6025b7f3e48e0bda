import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from installed import install
from small_recipe import written

from cora_plugin.cli import main
from cora_plugin.document import Document
from cora_plugin.recipe.folder import opened


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--cora", "budget=0"], "budget: 0.0 is not a positive amount"),
        (["demo", "--cora", "rank=3"], "unknown key 'rank'; did you mean ranks?"),
    ],
)
def test_wrong_settings_end_with_one_line_that_says_what(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dmeo"],
        ["demo", "--toolkit", "tensorrt"],
        ["demo", "--weight-bits", "1"],
        ["demo", "more"],
        ["run"],
        ["run", "recipe.yaml", "--overrides", "a=1"],
    ],
)
def test_unknown_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["recipe.yaml", "--set", "data.images"], "--set data.images: pass key=value"),
        (["recipe.yaml", "--set", "data.imagse=3"], "did you mean images?"),
        (["recipe.yaml", "--set", "model=3"], "model: 3 is not a mapping of names"),
    ],
)
def test_a_wrong_recipe_ends_with_one_line(
    flags, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "recipe.yaml")
    assert main(["run", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("toolkit", ["brevitas", "nncf"])
def test_an_absent_toolkit_is_named_with_the_way_out(toolkit, tmp_path, capsys):
    if find_spec(toolkit) is not None:
        pytest.skip(f"{toolkit} is installed")
    path = written(tmp_path / "recipe.yaml", toolkit=toolkit)
    assert main(["run", str(path), "--check"]) == 2
    error = capsys.readouterr().err
    assert f":6: toolkit: {toolkit} needs the package" in error
    assert f'pip install "cora-plugin[{toolkit}]"' in error


def test_brevitas_ptq_without_brevitas(capsys):
    if find_spec("brevitas") is not None:
        pytest.skip("brevitas is installed")
    assert main(["brevitas-ptq", "--cora"]) == 2
    error = capsys.readouterr().err
    assert 'pip install "cora-plugin[brevitas,cli]"' in error
    assert error.count("\n") == 1


@pytest.fixture
def environment(tmp_path_factory, monkeypatch):
    """That of a process which finds the plain toolkit."""
    site = tmp_path_factory.mktemp("site")
    install(site, monkeypatch, "plain-quantizer", {"plain": "plain_toolkit:TOOLKIT"})
    paths = os.pathsep.join([str(site), str(Path(__file__).parent / "support")])
    return {**os.environ, "PYTHONPATH": paths}


MAIN = [sys.executable, "-c", "import sys, cora_plugin.cli as c; sys.exit(c.main())"]


def start(tmp_path, environment):
    """A run that learns for long, once it has begun to."""
    slow = {"iterations": 10**6, "checkpoint": str(tmp_path / "search.pt")}
    cora = {"budget": 0.3, "search": "butterworth", "butterworth": slow}
    written(tmp_path / "recipe.yaml", toolkit="plain", cora=cora, ptq={})
    process = subprocess.Popen(
        [*MAIN, "run", "recipe.yaml"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if (tmp_path / "search.pt").exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_run_that_is_ended_leaves_its_checkpoint_alone(name, tmp_path, environment):
    process = start(tmp_path, environment)
    number = getattr(signal, name)
    process.send_signal(number)
    _, error = process.communicate()
    files = {path.name for path in tmp_path.iterdir()}
    if name == "SIGKILL":
        (tmp_path / "search.pt").unlink()
        assert (tmp_path / "out" / ".cora-part").exists()
        with opened(Document(), tmp_path / "out", keep=False):
            pass
        assert list((tmp_path / "out").iterdir()) == []
    else:
        assert process.returncode == 128 + number, error
        assert error.splitlines()[-1] == "cora-plugin: interrupted"
        assert "Traceback" not in error
        assert files == {"recipe.yaml", "search.pt"}


@pytest.mark.parametrize(("output", "code"), [("out", 0), ("ü", 2)])
def test_a_locale_without_the_characters_loses_nothing(
    output, code, tmp_path, environment
):
    written(tmp_path / "recipe.yaml", toolkit="plain", ptq={}, output=output)
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [*MAIN, "run", "recipe.yaml"],
        cwd=tmp_path,
        env=environment | ascii_only,
        capture_output=True,
        text=True,
        encoding="ascii",
    )
    assert done.returncode == code, done.stderr
    if code:
        assert "output: '\\xfc' is no name in this locale" in done.stderr
    else:
        text = (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")
        assert "┃" in text and "written to out" in done.stdout
