"""`cora-plugin run` with Brevitas: the whole way, and nothing half-written."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from onnx_files import packed_files_run
from small_recipe import images, net, photos, written

from cora_plugin import load_adapters
from cora_plugin.cli import main
from cora_plugin.guard import Guard, Step
from cora_plugin.integrations.brevitas import load_cora
from cora_plugin.integrations.brevitas.recipe import logits, quantize_ptq
from cora_plugin.integrations.brevitas.toolkit import TOOLKIT
from cora_plugin.integrations.toolkit import Export, declared

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
NEEDS_DEMO = pytest.mark.skipif(
    find_spec("foolbox") is None, reason="needs the demo's weights and photos"
)


def run(path, *overrides):
    return main(["run", str(path), *(f"--set={text}" for text in overrides)])


def result(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_whole_way(tmp_path, capsys):
    exports = ["onnx_qcdq", "adapters"]
    path = written(tmp_path / "recipe.yaml", exports=exports, test={"images": 20})
    assert main(["run", str(path), "--check"]) == 0
    assert "ready to run" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]

    assert run(path) == 0
    out = tmp_path / "out"
    said = capsys.readouterr().out
    report = result(out)
    rows = {row["model"]: row for row in report["rows"]}
    assert list(rows) == ["float", "Brevitas PTQ", "+ adapters"]
    assert rows["float"]["top1"] > 0.8 and rows["float"]["kl"] == 0
    assert rows["+ adapters"]["kl"] < rows["Brevitas PTQ"]["kl"] / 2
    assert 3 < rows["Brevitas PTQ"]["bits"] < rows["+ adapters"]["bits"]
    assert report["images"] == 20
    assert report["cora"]["images"] + report["cora"]["held_out"] == 40
    for text in ("+ adapters", "top-1", str(out)):
        assert text in said
    assert "KL to float" in (out / "report.txt").read_text()
    # What was exported is what was judged.
    for export in report["exports"]:
        assert export["bytes"] == (out / export["path"]).stat().st_size
    x, _ = images()
    session = onnxruntime.InferenceSession(out / "onnx_qcdq.onnx")
    name = session.get_inputs()[0].name
    got = np.concatenate([session.run(None, {name: i.numpy()})[0] for i in x.split(1)])
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images(64)), 16)
    fresh = quantize_ptq(net(), data, weight_bits=3, first_last_bits=3)
    load_cora(out / "adapters.safetensors", fresh)
    expected = logits(fresh, x).argmax(1).numpy()
    assert (got.argmax(1) == expected).mean() > 0.9

    # The resolved recipe does the same again.
    assert run(out / "recipe.yaml", f"output={tmp_path / 'again'}") == 0
    for row, other in zip(
        report["rows"], result(tmp_path / "again")["rows"], strict=True
    ):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


@packed_files_run
def test_widths_are_planned_as_the_file_stores_them(tmp_path, capsys):
    path = written(
        tmp_path / "recipe.yaml",
        cora={"budget": "1.3 ptq", "menu": [3, 4, 5, 8]},
        exports=[{"format": "onnx_qcdq", "packed": True}],
    )
    assert run(path) == 0
    out = tmp_path / "out"
    said = " ".join(capsys.readouterr().out.split())
    assert "onnx_qcdq.onnx stores weights of 4 and 8 bits, and 3 as 4, 5 as 8" in said
    report = result(out)
    assert report["recipe"]["cora"]["menu"] == [4, 8]
    assert {row["weight_bits"] for row in report["cora"]["layers"]} <= {3, 4, 8}
    assert (out / "widths.png").exists()
    assert "Bit widths, best first" in (out / "report.html").read_text()


def test_ptq_is_shown_at_its_own_widths(tmp_path):
    cora = {"budget": "0.9 ptq", "menu": [2, 3, 4, 8]}
    assert run(written(tmp_path / "recipe.yaml", cora=cora, exports=[])) == 0
    report = result(tmp_path / "out")
    bits = {row["model"]: row["bits"] for row in report["rows"]}
    assert report["cora"]["plan"]["layer_bits"]
    assert bits["+ adapters"] <= 0.9 * bits["Brevitas PTQ"] * (1 + 1e-9)
    allowed = report["cora"]["plan"]["allowed"]
    assert 0.9 * bits["Brevitas PTQ"] == pytest.approx(allowed)


def test_training_after_adapters(tmp_path):
    qat = {"epochs": 2, "lr": 1e-3, "labels": 0.5}
    recipe = written(tmp_path / "recipe.yaml", qat=qat, exports=["adapters"])
    assert main(["run", str(recipe)]) == 0
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    names = [row["model"] for row in report["rows"]]
    assert names == ["float", "Brevitas PTQ", "+ adapters", "+ qat"]
    assert report["rows"][3]["bits"] == report["rows"][2]["bits"]
    assert report["recipe"]["qat"]["epochs"] == 2
    # Four fifths of 40 images in batches of 16, twice.
    assert len(report["qat"]["transitions"]["steps"]) == 4
    assert "trs: 4 steps, 2 epochs" in (out / "report.txt").read_text()
    assert (out / "qat.png").exists()
    assert load_adapters(out / "adapters.safetensors")[0]


def test_what_is_wrong_with_training_says_its_line(tmp_path, capsys):
    recipe = written(tmp_path / "recipe.yaml", qat={"target": 1.5})
    assert main(["run", str(recipe)]) == 2
    assert "qat.target: 1.5 is out of range" in capsys.readouterr().err
    recipe = written(tmp_path / "recipe.yaml", qat={"epoch": 1})
    assert main(["run", str(recipe), "--check"]) == 2
    assert "qat: " in capsys.readouterr().err


def test_photos_without_labels_adapters_off_biases_corrected(tmp_path):
    folder = photos(tmp_path / "photos", 36)
    preprocessing = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    path = written(
        tmp_path / "recipe.yaml",
        data={"glob": f"{folder}/*/*.png", "preprocessing": preprocessing},
        ptq={"weight_bits": 3, "first_last_bits": 3, "bias_correction": True},
        cora=False,
        exports=["adapters"],  # There are none.
    )
    assert run(path, "data.images=24") == 0
    report = result(tmp_path / "out")
    assert report["cora"] is None and report["images"] == 12
    assert report["exports"] == []
    rows = report["rows"]
    assert [row["top1"] for row in rows] == [None, None]
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert resolved["data"]["images"] == 24 and resolved["test"]["images"] == 12
    assert run(path, "data.images=24", "ptq.bias_correction=false") == 0
    # Bias correction did something, and its row is the one before.
    assert result(tmp_path / "out")["rows"][1]["kl"] != rows[1]["kl"]


def test_gptq_with_adapters_and_bias_correction(tmp_path):
    ptq = {"weight_bits": 2, "first_last_bits": 4, "gptq": True}
    path = written(
        tmp_path / "recipe.yaml", ptq={**ptq, "bias_correction": True}, exports=[]
    )
    assert run(path) == 0
    _, plain, adapted = result(tmp_path / "out")["rows"]
    assert adapted["kl"] < plain["kl"]
    assert run(path, "ptq.gptq=false", f"output={tmp_path / 'other'}") == 0
    assert result(tmp_path / "other")["rows"][1]["kl"] != plain["kl"]


def test_adapters_after_gpfq_which_overwrites_float_weights(tmp_path):
    ptq = {"weight_bits": 2, "first_last_bits": 4, "gpfq": True}
    assert run(written(tmp_path / "recipe.yaml", ptq=ptq)) == 0
    _, plain, adapted = result(tmp_path / "out")["rows"]
    assert adapted["kl"] < plain["kl"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ptq": {"weight_bit": 4}}, ":8: ptq: unknown key 'weight_bit'; did you mean"),
        ({"ptq": {"weight_bits": "4"}}, ":8: ptq.weight_bits: '4' is not a whole num"),
        ({"ptq": {"gptq": 1}}, ":8: ptq.gptq: 1 is not true or false"),
        ({"ptq": {"gptq": True, "gpfq": True}}, "choose one of them"),
        ({"exports": ["onnx_qdcq"]}, "exports.0: unknown format 'onnx_qdcq'; did you"),
        ({"exports": ["openvino"]}, "exports.0: unknown format 'openvino'; use adapt"),
        (
            {"exports": [{"format": "adapters", "opset": 3}]},
            "exports.0: unknown key 'opset'",
        ),
        (
            {"exports": [{"format": "adapters", "path": "Report.json"}]},
            "exports.0.path: Report.json is in the way of the run's own files",
        ),
        (
            {"exports": [{"format": "qonnx", "opset_version": 99}]},
            "exports.0.opset_version: 99 is out of range; use 13 or more",
        ),
        (
            {"exports": [{"format": "onnx_qcdq", "packed": True, "opset_version": 17}]},
            "exports.0.opset_version: 17 with packed or int8_kernels",
        ),
        (
            {"ptq": {"act_range": "best"}},
            "ptq.act_range: 'best' is unknown; use one of auto, percentile, mse",
        ),
        ({"ptq": {"equalize_iters": -1}}, "ptq.equalize_iters: -1 is out of range"),
        ({"cora": {"ranks": {"nowhere": 1}}}, "nowhere"),
        ({"data": {"glob": "nowhere/*"}}, ":4: data.glob: no file matches nowhere/*"),
        (
            {"model": {"factory": "nowhere:net"}},
            ":2: model.factory: nowhere:net cannot",
        ),
        ({"model": {"timm": "resnet19"}}, ":2: model.timm: unknown model 'resnet19'"),
    ],
)
def test_what_is_wrong_ends_with_one_line(
    sections, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(written(tmp_path / "recipe.yaml", **sections)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("cora-plugin: ")
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_image_that_cannot_be_read_ends_the_run_at_once(tmp_path, capsys):
    folder = photos(tmp_path / "photos", 12)
    (folder / "class0" / "broken.png").write_text("no picture")
    preprocessing = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    source = {"folder": str(folder), "images": 13, "preprocessing": preprocessing}
    test = {"factory": "small_recipe:images"}
    path = written(tmp_path / "recipe.yaml", data=source, test=test)
    assert run(path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "broken.png: cannot be read as an image" in error
    assert not (tmp_path / "out").exists()


def test_labels_must_fit_the_outputs(tmp_path, capsys):
    folder = photos(tmp_path / "photos", 16, classes=4)
    preprocessing = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    source = {"folder": str(folder), "images": 8, "preprocessing": preprocessing}
    assert run(written(tmp_path / "recipe.yaml", data=source)) == 2
    assert "4 classes and the model 3 outputs; name the" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    path = written(tmp_path / "recipe.yaml")
    for check in ([], ["--check"]):
        output = f"--set=output={tmp_path / 'file' / 'out'}"
        assert main(["run", str(path), output, *check]) == 2
        error = capsys.readouterr().err
        assert "output: cannot write to" in error and error.count("\n") == 1


def test_a_failed_export_leaves_the_others_and_is_told(tmp_path, capsys, monkeypatch):
    def half(model, example, path):
        path.write_text("half of it")
        raise OSError(f"cannot write {path}: see that the disk has room")

    monkeypatch.setitem(TOOLKIT.exports, "qonnx", Export(half, ".onnx"))
    exports = ["adapters", {"format": "qonnx", "path": "a.onnx"}, "onnx_qcdq"]
    path = written(tmp_path / "recipe.yaml", exports=exports)
    assert run(path) == 3
    error = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'out' / 'a.onnx'}: see that" in error
    assert "recipe.yaml:" in error and "exports.1: qonnx cannot be written" in error
    assert error.count("\n") == 1
    out = tmp_path / "out"
    names = ["adapters.safetensors", "onnx_qcdq.onnx"]
    report = result(out)
    assert [export["path"] for export in report["exports"]] == names
    assert "exports.1: " in report["failures"][0]
    assert {*names, "report.json", "report.txt"} <= set(os.listdir(out))
    assert "a.onnx" not in os.listdir(out)
    # No export of this run stays beside the report of the next.
    assert run(path, "cora=false", "exports=[]") == 0
    reports = {"report.json", "report.txt", "report.html"}
    assert set(os.listdir(out)) == {"recipe.yaml", *reports}


def test_an_error_before_the_exports_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    old = json.dumps({"recipe": {}, "rows": []})
    (out / "report.json").write_text(old)
    assert run(written(tmp_path / "recipe.yaml"), "cora.ranks={nowhere: 1}") == 2
    assert os.listdir(out) == ["report.json"]
    assert (out / "report.json").read_text() == old


def test_a_run_does_not_replace_its_own_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "recipe.yaml", output=".")
    before = path.read_text()
    for more in ([], ["--check"]):
        assert main(["run", "recipe.yaml", *more]) == 2
        error = capsys.readouterr().err
        assert ": output: recipe.yaml is there, and no earlier run wrote it" in error
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_adapters_that_were_taken_back_leave_the_rest_of_a_run(
    tmp_path, capsys, monkeypatch
):
    def refuse(guard, name, correction, doubt=0.0, least=0.0):
        step = Step(name, guard.before, guard.before, False, 0.0, None, 1)
        guard.steps.append(step)
        return False

    monkeypatch.setattr(Guard, "step", refuse)
    exports = ["adapters", "onnx_qcdq"]
    path = written(tmp_path / "recipe.yaml", exports=exports, test={"images": 20})
    assert run(path) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no adapters.safetensors: no adapter made the network better" in said
    report = result(tmp_path / "out")
    assert [export["path"] for export in report["exports"]] == ["onnx_qcdq.onnx"]
    assert (tmp_path / "out" / "onnx_qcdq.onnx").exists()
    assert not (tmp_path / "out" / "adapters.safetensors").exists()


LITE0 = [
    "data.images=16",
    "data.args={count: 16, size: 64}",
    "test.args={crops_per_photo: 1, size: 64}",
    "cora.sensitivity_images=4",
    "exports=[adapters]",
]
SMALL_NET = [
    "model.factory=small_recipe:net",
    "data={factory: small_recipe:images, images: 40}",
    "test={}",
    "ptq.weight_bits=2",
    "ptq.first_last_bits=4",
    "cora.budget=0.3",
]
SHORT = {
    "brevitas-lite0-w4a8.yaml": LITE0,
    "brevitas-lite0-w4a4.yaml": SMALL_NET,
    "brevitas-lite0-gptq.yaml": SMALL_NET,
    "brevitas-lite0-butterworth.yaml": [
        *SMALL_NET,
        "cora.butterworth.iterations=20",
        "cora.butterworth.lr=0.05",
    ],
    "brevitas-timm-imagefolder.yaml": [
        "model.timm=test_efficientnet",
        "model.args={num_classes: 2}",
        "model.pretrained=false",
        "data.images=12",
        "data.preprocessing.size=64",
        "test.images=8",
    ],
}
"""What makes each ready recipe a matter of seconds."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=NEEDS_DEMO if cuts is LITE0 else ())
        for n, cuts in SHORT.items()
    ],
)
def test_a_ready_recipe_runs(name, tmp_path, monkeypatch):
    if "imagefolder" in name:
        for split in ("train", "val"):
            photos(tmp_path / split, 12, classes=2, side=80)
        monkeypatch.setenv("IMAGENET", str(tmp_path))
        torch.manual_seed(0)  # Its network has no trained weights.
    output = f"output={tmp_path / 'out'}"
    assert run(RECIPES / name, *SHORT[name], output) == 0
    report = result(tmp_path / "out")
    rows = report["rows"]
    assert len(rows) == 3 and all(row["top1"] is not None for row in rows)
    if "lite0-" in name:  # With trained weights.
        assert rows[2]["kl"] < rows[1]["kl"]
    for export in report["exports"]:
        assert export["bytes"] > 0


def test_every_option_is_explained():
    docs = (RECIPES / "README.md").read_text()
    names = [*declared(TOOLKIT.options), *TOOLKIT.exports]
    assert [name for name in names if f"`{name}`" not in docs] == []


COMMANDS = [
    line.split()[1:]
    for path in (RECIPES / "README.md", RECIPES.parents[1] / "README.md")
    for line in path.read_text().splitlines()
    if line.startswith("cora-plugin run docs/") and "nncf" not in line
]


@NEEDS_DEMO
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_of_the_docs_could_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, recipe, *flags = command
    path = str(RECIPES.parents[1] / recipe)
    assert main([run, path, *flags, "--check"]) == 0
    assert "ready to run" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_every_ready_recipe_is_run():
    assert {p.name for p in RECIPES.glob("brevitas-*.yaml")} == set(SHORT)
