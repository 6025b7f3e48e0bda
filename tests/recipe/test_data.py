"""What is wrong with a recipe's images ends a run with one line, before the toolkit."""

import pytest
from installed import install
from small_recipe import written

from cora_plugin.cli import main

WRONG = {
    "one_hot": "has a tensor [3] of torch.int64 for a label; make it the number of",
    "mixed": "make all of one size and type",
    "grey": "the float model does not run with [24, 1, 16, 16] of torch.float32: ",
    "as_bytes": "the float model does not run with [24, 3, 16, 16] of torch.uint8: ",
    "Raising": "small_recipe:Raising: item 9 cannot be made: KeyError: ",
}


@pytest.mark.parametrize("factory", WRONG)
def test_wrong_images(factory, tmp_path, tmp_path_factory, monkeypatch, capsys):
    site = tmp_path_factory.mktemp("site")
    install(site, monkeypatch, "plain-quantizer", {"plain": "plain_toolkit:TOOLKIT"})
    data = {"factory": f"small_recipe:{factory}", "images": 40}
    path = written(tmp_path / "recipe.yaml", toolkit="plain", ptq={}, data=data)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert WRONG[factory] in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        ("mapping", "a dict"),
        ("pair", "a tuple"),
        ("flat", "[24] of torch.float32"),
        ("one", "[1, 3] of torch.float32"),
        ("classes", "[24] of torch.int64"),
    ],
)
def test_outputs_that_a_recipe_cannot_judge(
    kind, made, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    site = tmp_path_factory.mktemp("site")
    install(site, monkeypatch, "plain-quantizer", {"plain": "plain_toolkit:TOOLKIT"})
    model = {"factory": "small_recipe:Several", "args": {"kind": kind}}
    path = written(tmp_path / "recipe.yaml", toolkit="plain", ptq={}, model=model)
    assert main(["run", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"model: for 24 images it gives {made}; a recipe takes models" in error
    assert error.count("\n") == 1
