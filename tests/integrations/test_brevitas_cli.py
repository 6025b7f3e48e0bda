"""Brevitas' ImageNet script with adapters: its flags, its flow, nothing left behind.

The network is torchvision's SqueezeNet 1.1 with random weights, found where torch.hub
keeps what it has downloaded before.
"""

import copy
import json
import random
import re
import shlex
import warnings
from dataclasses import asdict
from pathlib import Path

import brevitas.config
import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from brevitas_examples.imagenet_classification.ptq.ptq_imagenet_args import (
    create_args_parser,
)
from PIL import Image

from cora_plugin import CoRaError, ToolkitError
from cora_plugin.cli import main
from cora_plugin.config import RefineConfig
from cora_plugin.document import Document
from cora_plugin.integrations.brevitas import (
    apply_cora,
    load_cora,
    remove_cora,
    save_cora,
)
from cora_plugin.integrations.brevitas.cli import _config, parser, read_defaults
from cora_plugin.integrations.brevitas.imagenet import (
    _told,
    ptq_imagenet,
    stock_script,
)

CLASSES = 2


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny ImageFolder tree, and a torch.hub folder with SqueezeNet's weights."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for split, count in (("calibration", 6), ("validation", 2)):
        for index in range(count):
            folder = root / split / f"class{index % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((256, 256)).save(folder / f"{index}.png")
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    torch.manual_seed(0)
    net = torchvision.models.squeezenet1_1(weights=None)
    checkpoints = root / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(net.state_dict(), checkpoints / weights.url.rpartition("/")[2])
    return root


@pytest.fixture
def arguments(folders, tmp_path, monkeypatch):
    """A command line that the script runs in seconds."""
    monkeypatch.setenv("TORCH_HOME", str(folders))
    return [
        "--model-name=squeezenet1_1",
        f"--calibration-dir={folders / 'calibration'}",
        f"--validation-dir={folders / 'validation'}",
        "--calibration-samples=6",
        "--batch-size-calibration=3",
        "--workers=1",
        "--target-backend=layerwise",
        "--weight-bit-width=4",
        "--weight-quant-granularity=per_channel",
        "--graph-eq-iterations=1",
        f"--export-dir={tmp_path / 'out'}",
    ]


def global_state():
    return {
        "warnings": list(warnings.filters),
        "missing keys": brevitas.config.IGNORE_MISSING_KEYS,
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "cudnn": torch.backends.cudnn.benchmark,
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
    }


def test_the_whole_command(arguments, tmp_path, capsys):
    before = global_state()
    flags = ["--cora", "--cora-budget=0.1", "--cora-held-out=0.34"]
    assert main(["brevitas-ptq", *arguments, *flags, "--export-onnx-qcdq"]) == 0
    assert global_state() == before
    said = capsys.readouterr().out
    # Adapters stand between calibration and validation, inside bias correction's step.
    steps = ("activation calibration", "bias correction", "CoRa's adapters", "Total:")
    places = [said.index(step) for step in steps]
    assert places == sorted(places)
    report = json.loads((tmp_path / "out" / "cora_report.json").read_text())
    assert report["config"]["budget"] == "0.1 params"
    assert report["images"] == 4 and report["held_out"] == 2
    assert sum(layer["rank"] > 0 for layer in report["layers"]) > 5
    assert "budget 0.1 params" in " ".join(said.split())
    (path,) = (tmp_path / "out").glob("squeezenet1_1_*_cora.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (x,) = session.get_inputs()
    (logits,) = session.run(None, {x.name: np.ones(x.shape, np.float32)})
    assert logits.shape == (1, 1000) and np.isfinite(logits).all()


ROUND = [
    "--learned-round=identity",
    "--learned-round-mode=blockwise",
    "--learned-round-loss=mse",
    "--learned-round-iters=1",
]


def test_learned_round_finds_the_blocks_that_the_flag_names(arguments, capsys):
    flags = [*ROUND, "--no-bias-corr", "--no-cora"]
    name = "--learned-round-block-name=^(11|12)$"
    assert main(["brevitas-ptq", *arguments, *flags, name]) == 0
    assert "Number of blocks 2" in capsys.readouterr().out


def test_learned_round_without_a_block_is_an_error(arguments, capsys):
    assert main(["brevitas-ptq", *arguments, *ROUND]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert r"--learned-round-block-name: 'layer\\d+' is found in no module" in error
    assert "classifier" in error


def test_adapters_go_between_ptq_and_bias_correction(arguments, tmp_path):
    """The same as the three steps by hand, in the order that is right."""
    options = parser().parse_args([*arguments, "--cora=budget=0.1,held_out=0.34"])
    result = ptq_imagenet(options, _config(options), tmp_path / "report.json")
    save_cora(tmp_path / "adapters", result.model)
    with stock_script() as script:
        stock = create_args_parser().parse_args([*arguments, "--no-bias-corr"])
        _, model = script.quantize_ptq_imagenet(stock)
        loader = script.generate_dataloader(options.calibration_dir, 3, 1, 256, 224, 6)
        by_hand = copy.deepcopy(model)
        apply_cora(loader, by_hand, _config(options))
        step = result.report.steps[-1]
        assert step.name == "Brevitas' bias correction"
        if step.kept:
            script.apply_bias_correction(loader, by_hand)
    assert_same(result.model, by_hand)
    # And the adapters fit onto what Brevitas' own script makes.
    load_cora(tmp_path / "adapters", model)

    # Without adapters the script is Brevitas' own.
    plain = parser().parse_args([*arguments, "--no-bias-corr"])
    ours = ptq_imagenet(plain, _config(plain), tmp_path / "none.json")
    assert ours.report is None and not (tmp_path / "none.json").exists()
    remove_cora(model)
    assert_same(ours.model, model)


def assert_same(model, other):
    got, expected = model.state_dict(), other.state_dict()
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_the_command_of_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "brevitas.md").read_text()
    (command,) = re.findall(r"cora-plugin brevitas-ptq ((?:.*\\\n)*.*)\n", page)
    options = parser().parse_args(shlex.split(command.replace("\\\n", "")))
    assert options.gptq and options.weight_bit_width == 4
    assert str(_config(options).budget) == "0.2 bits"


def test_every_flag_of_brevitas_is_known():
    stock = {a.dest: a.default for a in create_args_parser()._actions}
    ours = {a.dest: a.default for a in parser()._actions}
    assert stock.items() <= ours.items()
    new = ours.keys() - stock.keys()
    assert new and all(name.startswith("cora") for name in new)
    assert {"cora_budget", "cora_ranks", "cora_butterworth_iterations"} <= new


def test_every_setting_says_what_it_is():
    for action in parser()._actions:
        if action.dest.startswith("cora"):
            assert len(action.help) > 15, action.dest


def test_the_template_of_brevitas_is_read(tmp_path):
    from importlib.resources import files

    package = "brevitas_examples.imagenet_classification.ptq"
    template = files(package) / "config" / "default_template.yaml"
    flags = parser()
    defaults = read_defaults(Document.read(template), flags)
    assert len(defaults) > 40
    for name, value in defaults.items():
        assert flags.get_default(name) == value, name


R = asdict(RefineConfig(iterations=3, lr=0.01))


@pytest.mark.parametrize(
    ("yaml", "flags", "expected"),
    [
        ("", [], None),
        ("", ["--cora"], {"budget": "0.05 params"}),
        ("cora: true", [], {"budget": "0.05 params"}),
        ("cora: true", ["--no-cora"], None),
        ("cora: false\ncora_budget: 0.1", [], None),
        ("cora_budget: 0.1", [], {"budget": "0.1 params"}),
        ("cora-budget: 0.1", ["--cora-budget", "3%"], {"budget": "0.03 params"}),
        ("cora: {budget: 0.2 bits, seed: 3}", ["--cora-seed=4"], {"seed": 4}),
        ("cora: budget=0.2 macs", [], {"budget": "0.2 macs"}),
        ("", ["--cora-ranks", "{'features.*': 2}"], {"ranks": {"features.*": 2}}),
        ("", ["--cora-damping", "1e-3"], {"damping": 1e-3}),
        ("", ["--cora-metric=svd"], {"metric": "svd", "regression": False}),
        ("cora: regression=true", ["--cora-metric=svd"], {"regression": True}),
        ("cora: {refine: {lr: 1e-2}}", ["--cora-refine-iterations=3"], {"refine": R}),
    ],
)
def test_settings_of_cora(yaml, flags, expected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    flags_ = parser()
    flags_.set_defaults(**read_defaults(Document.read(path), flags_))
    config = _config(flags_.parse_args(flags))
    if expected is None:
        assert config is None
    else:
        assert expected.items() <= config.to_dict().items()


def test_old_flags_of_settings_warn():
    with pytest.warns(FutureWarning, match="write refine"):
        config = _config(parser().parse_args(["--cora-fit-iterations=3"]))
    assert config.refine.iterations == 3


def test_an_impossible_setting_is_named_with_its_flag():
    options = parser().parse_args(["--cora", "seed=1", "--cora-butterworth-lr=0"])
    with pytest.raises(
        CoRaError, match=r"^--cora-butterworth-lr: butterworth\.lr: 0 is"
    ):
        _config(options)


def test_nested_settings_of_cora():
    flags = ["--cora-search=butterworth", "--cora-butterworth-iterations=40"]
    config = _config(parser().parse_args(flags))
    assert config.search == "butterworth"
    assert config.butterworth.iterations == 40 and config.butterworth.order == 4


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("gptq: true\ngtpq: true", r":2: unknown key 'gtpq'; did you mean gptq\?"),
        ("weight_bit_width: four", ":1: weight_bit_width: 'four' is not a whole"),
        ("bias_corr: 1", ":1: bias_corr: 1 is neither true nor false"),
        ("\ntarget_backend: tvm", ":2: target_backend: 'tvm' is none of fx, layerw"),
        ("learned_round_lr: fast", ":1: learned_round_lr: 'fast' is not a number"),
        ("a: 1\na: 2", ":2: a stands on line 1 already"),
        ("a: [", "not YAML"),
    ],
)
def test_wrong_keys_are_named_with_their_line(yaml, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    with pytest.raises(CoRaError, match=message):
        read_defaults(Document.read(path), parser())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--calibration-dir=nowhere"], "--calibration-dir: nowhere is not a folder"),
        (["--calibration-samples=7"], "has 6 images; pass --calibration-samples"),
        (["--validation-dir=."], "--validation-dir: . has no sub-folders with images"),
        (["--workers=0"], "--workers: 0; pass 1 or more"),
        (["--cora-budget=0"], "budget: 0.0 is not a positive amount"),
        (["--learned-round=sigmoid", "--target-backend=fx"], "learned round is only"),
        (["--weight-quant-granularity=per_group"], "no quantizer with 'per_group'"),
        (["--config=nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["--model-name=resnet18"], "--model-name: the weights of resnet18 cannot"),
    ],
)
def test_wrong_input_ends_with_one_line(
    change, message, arguments, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network
    monkeypatch.chdir(tmp_path)
    assert main(["brevitas-ptq", *arguments, *change]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("cora-plugin: ") and message in error
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gtpq"], "unknown flag '--gtpq'; did you mean --gptq?"),
        (["--cora-bugdet=1"], "unknown flag '--cora-bugdet'; did you mean --cora-b"),
        (["extra"], "unknown flag 'extra'; there are"),
    ],
)
def test_unknown_flags_are_refused(flags, message, arguments, capsys):
    assert main(["brevitas-ptq", *arguments, *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_impossible_value_is_refused_without_the_whole_list(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["brevitas-ptq", *arguments, "--model-name=none"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'none'" in error and "--cora-damping" not in error


def test_widths_are_planned_before_the_script_calibrates(arguments, tmp_path):
    """As small as the script's own widths make it, and GPTQ rounds at the planned."""
    settings = ["--cora-budget=1.0 ptq", "--cora-menu=3/4/6", "--cora-held-out=0.34"]
    assert main(["brevitas-ptq", *arguments, "--cora", "--gptq", *settings]) == 0
    report = json.loads((tmp_path / "out" / "cora_report.json").read_text())
    plan = report["plan"]
    assert plan["layer_bits"]  # Else there would be nothing to round anew.
    widths = {row["name"]: row["weight_bits"] for row in report["layers"]}
    assert plan["layer_bits"].items() <= widths.items()
    assert report["equivalent_bits"] <= plan["allowed"] * (1 + 1e-9)


def test_a_menu_where_nothing_is_calibrated_is_refused(arguments, capsys):
    flags = ["--cora-budget=1.0 ptq", "--cora-menu=4/8"]
    dynamic = "--act-scale-computation-type=dynamic"
    assert main(["brevitas-ptq", *arguments, "--cora", *flags, dynamic]) == 2
    assert "use static, or no menu" in capsys.readouterr().err


def test_a_failing_step_of_the_script_is_named():
    def calibrate(loader):
        return 1 / loader

    step = _told("calibrate", calibrate)
    assert step(2) == 0.5 and step.__name__ == "calibrate"
    match = "^Brevitas failed at calibrate, a step of its ImageNet script: Zero"
    with pytest.raises(ToolkitError, match=match) as error:
        step(0)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
