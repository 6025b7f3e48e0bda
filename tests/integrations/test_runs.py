"""What recipes say of both toolkits: devices, names in files, where errors arose."""

import json

import onnxruntime
import pytest
import torch
from small_recipe import images, written

from cora_plugin.cli import main

TOOLKITS = ("brevitas", "nncf")
PTQ = {"weight_bits": 3, "first_last_bits": 3}
ONNX = {"brevitas": "onnx_qcdq", "nncf": "onnx"}
NAMES = {"input_names": ["image"], "output_names": ["colour"]}


@pytest.fixture
def recipe(tmp_path, request):
    pytest.importorskip(request.getfixturevalue("toolkit"))
    path = tmp_path / "recipe.yaml"

    def make(**sections):
        toolkit = request.getfixturevalue("toolkit")
        return str(written(path, toolkit=toolkit, ptq=PTQ, **sections))

    return make


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_names_and_the_batch_size_of_a_file(toolkit, recipe, tmp_path, capsys):
    free = {"format": ONNX[toolkit], "path": "free.onnx", "dynamic_batch": True}
    bound = {"format": ONNX[toolkit], "path": "bound.onnx", "dynamic_batch": False}
    exports = [{**each, **NAMES} for each in (free, bound)]
    if toolkit == "nncf":
        whole = {"format": "openvino", "path": "net.xml", "dynamic_batch": True}
        exports.append({**whole, **NAMES})
    assert main(["run", recipe(exports=exports, device="CPU")]) == 0
    x = images(8)[0].numpy()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "free.onnx")
    (outputs,) = session.run(["colour"], {"image": x})
    assert outputs.shape == (8, 3)
    alone = onnxruntime.InferenceSession(tmp_path / "out" / "bound.onnx")
    assert alone.run(["colour"], {"image": x[:1]})[0].shape == (1, 3)
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        alone.run(["colour"], {"image": x})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["device"] == "cpu"
    if toolkit == "nncf":
        import openvino

        model = openvino.Core().read_model(tmp_path / "out" / "net.xml")
        assert model.input("image").partial_shape[0].is_dynamic
        assert model.input("image").partial_shape[1] == 3
        compiled = openvino.Core().compile_model(model, "CPU")
        assert compiled({"image": x})["colour"].shape == (8, 3)


@pytest.mark.parametrize("toolkit", TOOLKITS)
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"input_names": ["a", "b"]}, "input_names: ['a', 'b'] are 2, and the model"),
        ({"input_names": ["a"], "output_names": ["a"]}, "'a' is there twice"),
    ],
)
def test_wrong_names_fail_one_export(toolkit, recipe, names, said, tmp_path, capsys):
    exports = [{"format": ONNX[toolkit], **names}, "adapters"]
    assert main(["run", recipe(exports=exports)]) == 3
    error = capsys.readouterr().err
    assert said in error and "exports.0" in error and error.count("\n") == 1
    assert (tmp_path / "out" / "adapters.safetensors").exists()


@pytest.mark.parametrize("toolkit", TOOLKITS)
@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("tpu", "device: 'tpu' is unknown; use cpu, cuda"),
        ("cuda:99", "device: cuda:99: "),
        pytest.param(
            "mps",
            "device: mps: this torch finds none here; use cpu",
            marks=pytest.mark.skipif(
                torch.backends.mps.is_available(), reason="there is one"
            ),
        ),
    ],
)
def test_a_device_is_checked(toolkit, recipe, device, said, capsys):
    assert main(["run", recipe(device=device), "--check"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_run_on_a_gpu(toolkit, recipe, tmp_path):
    exports = [ONNX[toolkit], "adapters"]
    assert main(["run", recipe(exports=exports, device="cuda")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["model"]: row["kl"] for row in report["rows"]}
    assert rows["+ adapters"] < min(v for n, v in rows.items() if "PTQ" in n)


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_a_toolkits_failure_says_where_it_was(toolkit, recipe, tmp_path, capsys):
    path = recipe(model={"factory": "small_recipe:Untraceable"})
    assert main(["run", path]) == 2
    error = capsys.readouterr().err
    title = {"brevitas": "Brevitas", "nncf": "NNCF"}[toolkit]
    assert "recipe.yaml:" in error
    assert f": toolkit: {title} failed at " in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()
    log = tmp_path / "log.txt"
    assert main(["run", path, "--log", str(log)]) == 2
    assert "ZeroDivisionError: of the model's own" in log.read_text()
    assert "Traceback" in log.read_text()
