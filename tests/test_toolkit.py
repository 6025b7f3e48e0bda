"""A host is found by its entry point alone, and its toolkit does all that is asked."""

import json
import subprocess
import sys
import time

import pytest
import torch
from installed import install
from small_recipe import images, net, written

from cora_plugin import CoRaError
from cora_plugin.cli import main
from cora_plugin.compare.experiment import RAISED, Arm, variants
from cora_plugin.compare.rows import settings, table
from cora_plugin.compare.task import Task
from cora_plugin.integrations.toolkit import (
    declared,
    install_line,
    load_toolkit,
    toolkits,
)


@pytest.fixture
def plain(tmp_path, monkeypatch):
    points = {"plain": "plain_toolkit:TOOLKIT", "absent": "no_such_package:TOOLKIT"}
    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, monkeypatch, "plain-quantizer", points)
    return load_toolkit("plain")


def recipe(tmp_path, **sections):
    ptq = {"weight_bits": 3}
    return written(
        tmp_path / "recipe.yaml", **{"toolkit": "plain", "ptq": ptq} | sections
    )


def test_ours_come_first(plain):
    assert toolkits() == ["brevitas", "nncf", "absent", "plain"]
    assert plain.name == "plain"


def test_nothing_is_imported_until_it_is_wanted():
    code = (
        "import sys, cora_plugin.integrations.toolkit as t, cora_plugin.cli;"
        "t.toolkits(); cora_plugin.cli.parser();"
        "print(*{'brevitas', 'nncf', 'openvino', 'onnx'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_a_recipe_of_another_host(plain, tmp_path, capsys):
    exports = ["weights", {"format": "weights", "path": "half.pt", "half": True}]
    path = str(recipe(tmp_path, exports=exports))
    assert main(["run", path, "--check"]) == 0
    assert main(["run", path]) == 0
    assert "Plain torch PTQ" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reference, quantized, adapted = report["rows"]
    assert reference["kl"] == 0 < adapted["kl"] < quantized["kl"]
    assert 3 < quantized["bits"] < adapted["bits"]
    assert [each["path"] for each in report["exports"]] == [
        "weights.weights",
        "half.pt",
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Plain torch PTQ" in page and page.count("<circle") == 2
    assert "layers.5" in page and "factory: small_recipe:net" in page
    state = torch.load(tmp_path / "out" / "half.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float16}

    assert (
        main(["run", path, "--set=cora=false", "--set=ptq.bias_correction=true"]) == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"][1]["kl"] not in (quantized["kl"], adapted["kl"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"ptq": {"coarser": True}},
            "ptq: unknown key 'coarser'; did you mean coarse?",
        ),
        ({"ptq": {"coarse": 1}}, ":8: ptq.coarse: 1 is not true or false"),
        (
            {"exports": ["weight"]},
            "exports.0: unknown format 'weight'; did you mean we",
        ),
        (
            {"exports": [{"format": "weights", "half": 1}]},
            "exports.0.half: 1 is not true or false",
        ),
        (
            {"exports": [{"format": "weights", "whole": True}]},
            "exports.0: unknown key 'whole'; use format, half, path",
        ),
        (
            {"exports": ["weights", "weights"]},
            "exports.1.path: weights.weights is written twice; name another file",
        ),
        ({"ptq": {"weight_bits": 99}}, "ptq.weight_bits: 99 is out of range; use 2"),
        ({"ptq": {"act_bits": -8}}, "ptq.act_bits: -8 is out of range; use 2"),
        ({"ptq": {"layer_bits": {"a": 1}}}, "ptq.layer_bits.a: 1 is out of range"),
    ],
)
def test_wrong_options_and_formats(plain, sections, message, tmp_path, capsys):
    assert main(["run", str(recipe(tmp_path, **sections)), "--check"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"test": {"factory": "small_recipe:spoiled"}},
            "test images: test.factory: small_recipe:spoiled: item 9 holds NaN",
        ),
        (
            {"model": {"factory": "small_recipe:overflowing"}},
            "makes the float model give",
        ),
        (
            {"data": {"factory": "small_recipe:labelled_below", "images": 5}},
            "data.factory: label -2 is none of the model's 3 outputs, which",
        ),
    ],
)
def test_what_cannot_be_judged_is_refused(plain, sections, message, tmp_path, capsys):
    assert main(["run", str(recipe(tmp_path, **sections))]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_due_once_on_a_machine_is_in_no_seconds(
    plain, monkeypatch, tmp_path, capsys
):
    done = []
    work = ("it is slow, once", lambda: (time.sleep(3), done.append(1)))
    monkeypatch.setattr(type(plain), "first_use", lambda self: (work,))
    assert main(["run", str(recipe(tmp_path))]) == 0
    assert "it is slow, once" in capsys.readouterr().out and done == [1]
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["rows"]
    assert rows[1]["seconds"] < 3


def test_figures_that_are_not_finite_are_null_with_the_reason(
    plain, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        type(plain), "outputs", lambda *_: torch.full((24, 3), torch.nan)
    )
    assert main(["run", str(recipe(tmp_path, cora=False))]) == 0

    def refuse(word):
        raise ValueError(word)

    text = (tmp_path / "out" / "report.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    assert report["rows"][1]["kl"] is None
    assert report["not_finite"]["rows.1.kl"] == "inf"


def test_rows_of_another_host(plain):
    x, labels = images(96)
    task = Task("small", net(), x[:64], x[64:], labels[64:])
    arms = [
        Arm("svd uniform", {"budget": 0.3, **settings("svd uniform")}, "0.3"),
        Arm("default", {"budget": 0.3}, "0.3", raised=True),
    ]
    options = plain.options(weight_bits=3)
    found = [*variants(plain, task, options, arms, "ptq")]
    rows = [
        task.judge(plain.outputs(variant.model, task.test), **variant.about)
        for variant in found
    ]
    assert [(row.recipe, row.method) for row in rows] == [
        ("ptq", "none"),
        ("ptq+bc", "none"),
        ("ptq+bc", "svd uniform"),
        ("ptq+bc", "default"),
        ("ptq", RAISED),
        ("ptq+bc", RAISED),
    ]
    kl = {(row.recipe, row.method): row.kl for row in rows}
    assert kl["ptq+bc", "default"] < kl["ptq", "none"]
    assert kl["ptq", "none"] != kl["ptq+bc", "none"]
    none, _, _, default, raised, _ = (row.equivalent_bits for row in rows)
    assert none < raised <= default
    assert {row.budget for row in rows} == {"", "0.3"}
    assert table(rows, {"adapters": "method"}).row_count == 6


def test_adapters_of_one_arm_are_not_in_another(plain):
    x, _ = images(96)
    task = Task("small", net(), x[:64], x[64:])
    arms = [Arm("default", {"budget": 0.3}), Arm("svd spectral", {"budget": 0.3})]
    none, _, *adapted = variants(plain, task, plain.options(weight_bits=3), arms)
    first, second = (plain.outputs(each.model, task.test) for each in adapted)
    assert torch.equal(first, second)  # The same settings on the same model.
    assert not torch.equal(first, plain.outputs(none.model, task.test))


def test_an_unknown_host_is_named(plain):
    with pytest.raises(CoRaError, match="unknown toolkit 'plane'; did you mean plain"):
        load_toolkit("plane")


def test_an_absent_toolkit_is_named_with_the_way_out(plain, tmp_path, capsys):
    line = "absent needs the package no_such_package, which is not installed; "
    with pytest.raises(ModuleNotFoundError, match=line) as error:
        load_toolkit("absent")
    assert str(error.value).endswith("pip install plain-quantizer")
    assert main(["run", str(recipe(tmp_path, toolkit="absent")), "--check"]) == 2
    error = capsys.readouterr().err
    assert f"recipe.yaml:6: toolkit: {line}pip install plain-quantizer\n" in error


def test_install_lines(plain):
    assert install_line("nncf") == 'pip install "cora-plugin[nncf]"'
    assert install_line("nncf", "demo") == 'pip install "cora-plugin[demo,nncf]"'
    beside = 'pip install "cora-plugin[demo]" plain-quantizer'
    assert install_line("plain", "demo") == beside


def test_onnxruntime_runs_none_of_its_formats(plain):
    with pytest.raises(
        CoRaError, match="onnxruntime runs none of its formats, weights"
    ):
        plain.onnxruntime_format()


def test_declared_options(plain):
    hints = declared(plain.options)
    assert hints["coarse"] is bool and hints["depthwise_bits"] == int | None
