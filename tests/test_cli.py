from importlib.util import find_spec

import pytest
from small_recipe import written

from cora_plugin.cli import main


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
