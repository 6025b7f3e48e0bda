import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from installed import install
from small_recipe import photos, written

import cora_plugin
from cora_plugin.cli import main
from cora_plugin.document import Document
from cora_plugin.progress import quiet, told
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
        ["run", "recipe.yaml", "--overrides", "a=1"],
        ["run", "recipe.yaml", "--che"],
        ["demo", "--tool", "brevitas"],
        ["run", "recipe.yaml", "--quiet", "--verbose"],
        ["--vers"],
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
        (
            ["recipe.yaml", "--timm", "resnet18"],
            "--timm: the recipe says it; use",
        ),
        ([], "name a recipe, or one model by --timm, --torchvision or --factory"),
        (["--timm", "a", "--factory", "b"], "or one model by --timm"),
        (["--timm", "resnet18"], "name a folder of images by --images"),
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


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["run", "--help"], ["init", "--help"]]
)
def test_version_and_help_need_no_torch(arguments):
    code = (
        "import sys, cora_plugin.cli as c\n"
        f"try: c.main({arguments!r})\n"
        "except SystemExit: print({'torch', 'numpy'} & {*sys.modules} or 'light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "light", done.stderr


def test_the_package_is_a_command_and_knows_its_version(environment):
    command = [sys.executable, "-m", "cora_plugin", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == cora_plugin.__version__ == version("cora-plugin")


@pytest.fixture
def plain(tmp_path_factory, monkeypatch):
    site = tmp_path_factory.mktemp("site")
    install(site, monkeypatch, "plain-quantizer", {"plain": "plain_toolkit:TOOLKIT"})


FLAGS = ["--factory", "small_recipe:net", "--images", "photos", "--toolkit", "plain"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--timm", "resnet81"], "model.timm: unknown model 'resnet81'; did you mean"),
        (["--torchvision", "resnet81"], "model.torchvision: unknown model 'resnet81'"),
        (["--factory", "small_recipe:nett"], "has no attribute 'nett'"),
        ([*FLAGS[:2], "--formats", "weight"], "unknown format 'weight'"),
    ],
)
def test_init_refuses_names_that_run_would_refuse(
    plain, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 12)
    assert main(["init", *FLAGS[2:], *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()


def test_init_writes_a_recipe_that_is_ready(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 12)
    given = [*FLAGS, "--weight-bits", "3", "--formats", "weights"]
    assert main(["init", *given]) == 0
    assert "recipe.yaml: written" in capsys.readouterr().out
    assert main(["run", "recipe.yaml", "--check", "--set", "data.images=6"]) == 0
    values = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert values["ptq"] == {"weight_bits": 3} and values["exports"] == ["weights"]
    before = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert main(["init", *given]) == 2
    assert "recipe.yaml: is there already" in capsys.readouterr().err
    assert (tmp_path / "recipe.yaml").read_text(encoding="utf-8") == before
    assert main(["init", "no/where.yaml", *given]) == 2
    error = capsys.readouterr().err
    assert error == (
        "cora-plugin: no/where.yaml: cannot be written: No such file or directory\n"
    )


def test_run_takes_the_flags_without_a_file(plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", 24, side=16)
    size = "data.preprocessing.size=16"
    sets = ["--set", "data.images=18", "--set", size, "--set", "cora=false"]
    output = ["--output", "out", "--quiet", "--log", "run.log"]
    assert main(["run", *FLAGS, *sets, *output]) == 0
    assert capsys.readouterr().out == ""
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["rows"]) == 2
    assert {"date", "host", "versions"} <= report.keys()
    assert (tmp_path / "run.log").exists()
    assert main(["run", *FLAGS, *sets, *output[:-1], "no/where.log"]) == 2
    assert "--log no/where.log: cannot be written: No" in capsys.readouterr().err


def test_what_toolkits_print_goes_where_it_is_wanted(tmp_path):
    stream = io.StringIO()
    with told(stream), quiet():
        sys.stdout.write("printed")
        logging.getLogger("toolkit").info("logged")
    assert "printed" in stream.getvalue() and "toolkit: logged" in stream.getvalue()
    with quiet():
        sys.stdout.write("hidden")
    assert "hidden" not in stream.getvalue()


ENTRY = "cora_plugin.__main__"


def heed_signals():
    """What a background job starts ignores some, as the job itself does."""
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


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
        preexec_fn=heed_signals,
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
    # tox has it, which is stronger than a locale.
    environment = {k: v for k, v in environment.items() if k != "PYTHONIOENCODING"}
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


LOST = """
import _thread, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell may ignore it.
from cora_plugin import cli

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def lose(*_):
    Finalized()  # Python prints what a finalizer raises, and goes on.
    for _ in range(10**9):
        pass

def hide(*_):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    raise ImportError("initialization failed")  # As extensions do.

cli._run = {run}
sys.exit(cli.main(["run", "recipe.yaml"]))
"""


@pytest.mark.parametrize("run", ["lose", "hide"])
def test_an_interrupt_that_is_lost_ends_a_command_with_one_line(run, environment):
    done = subprocess.run(
        [sys.executable, "-c", LOST.replace("{run}", run)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "cora-plugin: interrupted\n")


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.3, 1])
def test_an_interrupt_while_modules_are_imported_is_one_line(
    seconds, environment, tmp_path
):
    begun = f"from {ENTRY} import main; print(flush=True); main()"
    process = subprocess.Popen(
        [sys.executable, "-c", begun, "run", "recipe.yaml"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert len(error.splitlines()) == 1, error


def test_an_interrupt_that_became_another_error_is_one(monkeypatch, capsys):
    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("cannot be imported") from error

    monkeypatch.setattr("cora_plugin.cli._run", interrupted)
    assert main(["run", "recipe.yaml"]) == 130
    assert capsys.readouterr().err == "cora-plugin: interrupted\n"
