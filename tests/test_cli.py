import pytest

from cora_plugin.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--cora", "budget=0"], "budget: 0.0 is not a positive amount"),
        (["demo", "--cora", "rank=3"], "unknown key 'rank'; the keys are budget,"),
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
    [[], ["dmeo"], ["demo", "--toolkit", "tensorrt"], ["demo", "--weight-bits", "1"]],
)
def test_unknown_arguments_are_refused(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
