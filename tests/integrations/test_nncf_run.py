"""`cora-plugin run` with NNCF; what every toolkit shares is tested with Brevitas."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
from small_recipe import images, photos, written

from cora_plugin.cli import main
from cora_plugin.integrations.nncf.toolkit import TOOLKIT
from cora_plugin.integrations.toolkit import declared
from cora_plugin.recipe import Recipe
from cora_plugin.recipe import run as run_recipe

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"


def run(path, *overrides):
    return main(["run", str(path), *(f"--set={text}" for text in overrides)])


def result(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_whole_way(tmp_path):
    exports = ["openvino", "onnx", "adapters"]
    path = written(
        tmp_path / "recipe.yaml",
        toolkit="nncf",
        ptq={"weight_bits": 2, "first_last_bits": 4, "depthwise_bits": 4},
        exports=exports,
    )
    assert run(path) == 0
    out = tmp_path / "out"
    report = result(out)
    rows = {row["model"]: row for row in report["rows"]}
    assert list(rows) == ["float", "NNCF PTQ", "+ adapters"]
    assert rows["+ adapters"]["kl"] < rows["NNCF PTQ"]["kl"]
    sizes = {e["format"]: e["bytes"] for e in report["exports"]}
    weights = (out / "openvino.bin").stat().st_size
    assert sizes["openvino"] == weights + (out / "openvino.xml").stat().st_size
    # Both files compute the same.
    x = images()[0].numpy()
    session = onnxruntime.InferenceSession(
        out / "onnx.onnx", providers=["CPUExecutionProvider"]
    )
    (theirs,) = session.run(None, {"input": x})
    ours = openvino.Core().compile_model(out / "openvino.xml", "CPU")(x)[0]
    assert (ours.argmax(1) == theirs.argmax(1)).mean() > 0.9
    assert np.isfinite(ours).all()


def test_bias_correction_without_adapters(tmp_path):
    ptq = {"weight_bits": 2, "first_last_bits": 4, "depthwise_bits": 4}
    path = written(tmp_path / "recipe.yaml", toolkit="nncf", cora=False, ptq=ptq)
    assert run(path) == 0
    plain = result(tmp_path / "out")["rows"][1]
    assert run(path, "ptq.bias_correction=true") == 0
    corrected = result(tmp_path / "out")["rows"][1]
    assert corrected["kl"] != plain["kl"]


SHORT = {
    "nncf-lite0-w4a8.yaml": [
        "data.images=16",
        "data.args={count: 16, size: 64}",
        "test.args={crops_per_photo: 1, size: 64}",
        "cora.sensitivity_images=4",
        "exports=[adapters]",
    ],
    "nncf-torchvision-photos.yaml": [
        "model.torchvision=squeezenet1_1",
        "model.pretrained=false",
        "cora.ranks={classifier.1: 0}",
        "data.images=10",
        "data.preprocessing.size=64",
        "test.images=4",
    ],
}
"""What makes each ready recipe a matter of seconds."""


@pytest.mark.parametrize("name", SHORT)
def test_a_ready_recipe_runs(name, tmp_path, monkeypatch):
    if "lite0" in name and find_spec("foolbox") is None:
        pytest.skip("needs the demo's weights and photos")
    monkeypatch.chdir(tmp_path)
    folder = photos(tmp_path / "photos", 14, side=48)
    for picture in folder.rglob("*.png"):
        picture.rename(picture.with_suffix(".jpg"))
    assert run(RECIPES / name, *SHORT[name], "output=out") == 0
    report = result(tmp_path / "out")
    _, plain, adapted = report["rows"]
    assert adapted["bits"] > plain["bits"]
    if "lite0" in name:
        assert adapted["kl"] < plain["kl"]
    assert all(export["bytes"] > 0 for export in report["exports"])


def test_every_option_is_explained():
    docs = (RECIPES / "README.md").read_text()
    names = [*declared(TOOLKIT.options), *TOOLKIT.exports]
    assert [name for name in names if f"`{name}`" not in docs] == []


def test_every_ready_recipe_is_run():
    assert {p.name for p in RECIPES.glob("nncf-*.yaml")} == set(SHORT)


def test_training_moves_biases_and_norms_too(tmp_path):
    """NNCF's model has the float model's own parameters, as they were loaded."""
    path = written(
        tmp_path / "recipe.yaml",
        toolkit="nncf",
        data={"factory": "small_recipe:images", "images": 40, "batch_size": 8},
        ptq={"weight_bits": 2},
        cora=False,
        qat={"epochs": 5, "lr": 1e-3},
    )
    results = run_recipe(Recipe.read(path))
    assert results.qat.kept
    before = dict(results.float_model.named_parameters())
    after = dict(results.model.named_parameters())
    assert all(not after[name].equal(value) for name, value in before.items())
