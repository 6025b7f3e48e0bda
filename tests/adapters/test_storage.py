import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from full_disk import full_disk
from safetensors import safe_open
from safetensors.torch import save_file

from cora_plugin.adapters import (
    Kind,
    Operation,
    load_adapters,
    make_adapter,
    save_adapters,
)
from cora_plugin.adapters.content import CHECKSUM, checksum
from cora_plugin.adapters.errors import CoRaError, FileError
from cora_plugin.adapters.factor import Weighting
from cora_plugin.adapters.fingerprint import Fingerprint


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def adapters():
    plain = Operation(2, (1, 1), "same", "zeros", (1, 1), 2)
    depthwise = Operation(1, (1,), ((1, 1),), "zeros", (1,), 40)
    plainly = Weighting()
    made = {
        "features.0.conv": make_adapter(randn(8, 4, 3, 3), plain, 2, plainly),
        "depthwise": make_adapter(randn(40, 1, 5), depthwise, 2, plainly, 4),
        "small": make_adapter(randn(6, 6), Operation(), 6, plainly),
        "head": make_adapter(randn(9, 30), Operation(), 3, plainly, 32),
    }
    assert {a.kind for a in made.values()} == set(Kind)
    return made


@pytest.fixture
def file(adapters, tmp_path):
    path = tmp_path / "adapters.safetensors"
    save_adapters(path, adapters, {"head": randn(9), "stem": randn(16)})
    return path


def rewrite(path, tensors=None, sealed=True, **header):
    """Write the file again with other tensors or header fields.

    `sealed` ones get the checksum that fits.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        stored = {key: file.get_tensor(key) for key in file.keys()}
    stored.update(tensors or {})
    kept = {key: tensor for key, tensor in stored.items() if tensor is not None}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in header.items()}
    metadata |= texts
    if sealed and metadata.pop(CHECKSUM, None):
        metadata[CHECKSUM] = checksum(kept, metadata)
    save_file(kept, path, metadata=metadata)


def layers_in(path):
    return header_of(path, "layers")


def header_of(path, field):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[field])


def test_adapters_come_back_exactly(adapters, tmp_path):
    notes = {"model": "lite0", "kl": 0.25, "seen": [1, 2]}
    save_adapters(tmp_path / "a.safetensors", adapters, notes=notes)
    loaded, shifts, loaded_notes = load_adapters(tmp_path / "a.safetensors")
    assert loaded_notes == notes
    assert not shifts
    assert list(loaded) == list(adapters)
    for name, adapter in adapters.items():
        other = loaded[name]
        fields = "kind", "rank", "weight_shape", "groups", "stored_bits", "fingerprint"
        for field in fields:
            assert getattr(other, field) == getattr(adapter, field)
        for key, tensor in adapter.tensors.items():
            assert torch.equal(other.tensors[key].values, tensor.values)
            assert other.tensors[key].values.dtype == tensor.values.dtype
            if tensor.scale is None:
                assert other.tensors[key].scale is None
            else:
                assert torch.equal(other.tensors[key].scale, tensor.scale)
        assert torch.equal(other.merged(), adapter.merged())


def test_shifts_come_back_exactly(adapters, tmp_path):
    # Beside an adapter, without one, named like a factor, and as a layer adds them.
    shifts = {
        "head": randn(9),
        "stem": randn(16, seed=1),
        "head/a": randn(9, seed=2),
        "depthwise": torch.nn.Parameter(randn(40, 1, seed=3).double()),
    }
    save_adapters(tmp_path / "a.safetensors", adapters, shifts)
    loaded, read, _ = load_adapters(tmp_path / "a.safetensors")
    assert list(loaded) == list(adapters)
    assert list(read) == list(shifts)
    for name, shift in shifts.items():
        assert torch.equal(read[name], shift.detach().flatten().float())


def test_rounding_shifts_come_back_exactly_and_may_be_missing(adapters, tmp_path):
    path = tmp_path / "a.safetensors"
    known = replace(adapters["head"], rounding_shift=randn(9))
    save_adapters(path, {**adapters, "head": known}, {"head": randn(9, seed=1)})
    loaded, shifts, _ = load_adapters(path)
    assert torch.equal(loaded["head"].rounding_shift, known.rounding_shift)
    assert torch.equal(shifts["head"], randn(9, seed=1))
    assert loaded["small"].rounding_shift is None
    rewrite(path, {"head/rounding_shift": None})
    assert load_adapters(path)[0]["head"].rounding_shift is None


@pytest.mark.parametrize(
    "wrong", [randn(8), randn(9).double(), torch.full((9,), torch.nan)]
)
def test_a_rounding_shift_that_does_not_fit_is_refused(wrong, adapters, tmp_path):
    path = tmp_path / "a.safetensors"
    known = replace(adapters["head"], rounding_shift=randn(9))
    save_adapters(path, {"head": known})
    rewrite(path, {"head/rounding_shift": wrong})
    with pytest.raises(FileError, match="head/rounding_shift"):
        load_adapters(path)
    with pytest.raises(CoRaError, match=r"9 outputs has shape \[8\]"):
        replace(known, rounding_shift=randn(8))


def test_the_file_tells_what_its_adapters_were_made_for(tmp_path):
    layer, weight = Operation(), randn(9, 30)
    adapter = make_adapter(randn(9, 30, seed=1), layer, 3, Weighting())
    made_for = Fingerprint.of(weight, 4, layer)
    adapter = replace(adapter, fingerprint=made_for)
    save_adapters(tmp_path / "a.safetensors", {"head": adapter})
    read = load_adapters(tmp_path / "a.safetensors")[0]["head"].fingerprint
    assert read.difference(made_for, weight.numel()) is None
    doubled = Fingerprint.of(2 * weight, 4, layer)
    assert "other scales" in read.difference(doubled, weight.numel())
    versions = header_of(tmp_path / "a.safetensors", "versions")
    assert versions.keys() == {"cora-plugin", "torch"}


def test_a_file_is_read_with_torch_alone(file):
    """No toolkit is imported."""
    code = f"""
import sys
from cora_plugin.adapters import load_adapters
adapters, _, _ = load_adapters({str(file)!r})
assert {{a.merged().shape for a in adapters.values()}}
loaded = {{name.partition(".")[0] for name in sys.modules}}
assert not loaded & {{"brevitas", "nncf", "openvino", "onnx"}}, loaded
"""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # not the checkout in the cwd
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_integers_take_a_byte_in_the_file(tmp_path):
    adapter = make_adapter(randn(256, 256), Operation(), 32, Weighting())
    save_adapters(tmp_path / "a.safetensors", {"fc": adapter})
    size = (tmp_path / "a.safetensors").stat().st_size
    assert size < adapter.stored_bits / 8 + 1000


def test_layers_may_share_an_adapter(adapters, tmp_path):
    twice = {"one": adapters["head"], "two": adapters["head"]}
    save_adapters(tmp_path / "a.safetensors", twice)
    loaded, _, _ = load_adapters(tmp_path / "a.safetensors")
    assert torch.equal(loaded["two"].merged(), adapters["head"].merged())


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_adapters(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a" * 50, bytes(100), b"\xff" * 64])
def test_a_corrupt_file_is_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"a\.safetensors: not a readable"):
        load_adapters(path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, file):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(FileError, match=r"adapters\.safetensors: not a readable"):
        load_adapters(file)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"conv.weight": torch.ones(3)}, path)
    with pytest.raises(FileError, match="pass a file that save_adapters wrote"):
        load_adapters(path)
    save_file({"conv.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    with pytest.raises(FileError, match="pass a file that save_adapters wrote"):
        load_adapters(path)


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_an_earlier_format_is_refused_with_the_way_out(version, file):
    rewrite(file, format=f"cora-plugin adapters {version}")
    with pytest.raises(FileError, match=r"earlier version.*apply CoRa again and save"):
        load_adapters(file)


def test_another_version_of_the_format_is_refused(file):
    rewrite(file, format="cora-plugin adapters 99")
    with pytest.raises(FileError, match="adapters 99"):
        load_adapters(file)


@pytest.fixture
def earlier(tmp_path):
    """A file of version 0.1."""
    path = tmp_path / "adapters.safetensors"
    shutil.copy(Path(__file__).parent / "format-3.safetensors", path)
    return path


def test_a_file_of_version_0_1_is_read(earlier):
    adapters, shifts, notes = load_adapters(earlier)
    expected = {
        "features.0.conv": ("low-rank 2", 8, 864, [1.3068931, 1.1695230, -0.0633621]),
        "depthwise": ("shared-basis 2", 4, 296, [-0.2811684, 0.2811684, 0.2811684]),
        "small": ("whole 2 bits", 2, 176, [-1.2632468, 1.2632468, 0]),
        "head": ("low-rank 1", 32, 480, [0.9124212, 1.1318023, 1.0460948]),
    }
    assert list(adapters) == list(expected)
    for name, (title, bits, stored, weights) in expected.items():
        adapter = adapters[name]
        assert str(adapter) == title
        assert [form.bits for form in adapter.forms] == [bits]
        assert adapter.stored_bits == adapter.cost().bits == stored
        found = adapter.merged().flatten()[:3]
        torch.testing.assert_close(found, torch.tensor(weights), atol=1e-6, rtol=1e-6)
    assert adapters["features.0.conv"].weight_shape == (8, 2, 3, 3)
    assert adapters["features.0.conv"].groups == 2
    levels = [[-1, 1, 0, 0, 0, 0], [-1, 0, 0, 0, 1, 0]]
    assert adapters["small"].tensors["a"].values[:2].tolist() == levels
    made_for = adapters["head"].fingerprint
    assert made_for.bits == 4 and made_for.steps[0] == -35.8145
    assert torch.equal(shifts["stem"], torch.arange(3.0))
    assert notes == {"written by": "0.1.0"}


def test_what_version_0_1_wrote_is_written_anew(earlier, tmp_path):
    adapters, shifts, notes = load_adapters(earlier)
    save_adapters(tmp_path / "new.safetensors", adapters, shifts, notes)
    again, _, _ = load_adapters(tmp_path / "new.safetensors")
    for name, adapter in adapters.items():
        assert again[name].forms == adapter.forms
        assert torch.equal(again[name].merged(), adapter.merged())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "round"),
        ("kind", "full"),
        ("kind", "shared-basis"),
        ("rank", 2),
        ("rank", "three"),
        ("rank", 1.0),
        ("rank", 0),
        ("weight_shape", [9, 31]),
        ("weight_shape", 9),
        ("groups", 2),
        ("bits", {"a": 32}),
        ("bits", {"b": 32}),
        ("bits", {"a": 8, "b": 8}),
        ("bits", {"a": 32, "b": 16}),
        ("bits", [32, 32]),
        ("bits", {"a": "many", "b": 32}),
        ("fingerprint", 7),
    ],
)
def test_a_header_of_version_0_1_is_checked_as_strictly(field, value, earlier):
    layers = layers_in(earlier)
    layers["head"][field] = value
    rewrite(earlier, layers=layers)
    with pytest.raises(FileError, match=r"header and tensors disagree.*head"):
        load_adapters(earlier)


@pytest.mark.parametrize("layers", ["not json", "[]", "3", '{"head": 3}', '{"a": {}}'])
def test_a_header_that_is_not_of_adapters_is_refused(layers, file):
    rewrite(file, layers=layers)
    with pytest.raises(FileError, match="header and tensors disagree"):
        load_adapters(file)


@pytest.mark.parametrize("shifts", ["not json", "[]", "3", '{"head": "nine"}'])
def test_a_header_that_is_not_of_shifts_is_refused(shifts, file):
    rewrite(file, shifts=shifts)
    with pytest.raises(FileError, match="header and tensors disagree"):
        load_adapters(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_shape", [9, 31]),
        ("weight_shape", [30, 9]),
        ("weight_shape", 9),
        ("weight_shape", [9]),
        ("groups", 2),
        ("groups", 0),
        ("terms", []),
        ("terms", 3),
        ("terms", "low-rank"),
        ("terms", [{"kind": "low-rank", "rank": 3}]),
        ("terms", 2 * [{"kind": "low-rank", "rank": 3, "bits": 32}]),
        ("fingerprint", 7),
        ("fingerprint", {"bits": 4}),
    ],
)
def test_a_header_that_contradicts_its_tensors_is_refused(field, value, file):
    layers = layers_in(file)
    layers["head"][field] = value
    rewrite(file, layers=layers)
    with pytest.raises(FileError, match=r"header and tensors disagree.*head"):
        load_adapters(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "round"),
        ("kind", "whole"),
        ("kind", "full"),
        ("kind", "shared-basis"),
        ("rank", 2),
        ("rank", "three"),
        ("rank", 3.0),
        ("rank", True),
        ("rank", 0),
        ("rank", -1),
        ("bits", 8),
        ("bits", 16),
        ("bits", 1),
        ("bits", "many"),
        ("bits", {"a": 32, "b": 32}),
    ],
)
def test_a_term_that_contradicts_its_tensors_is_refused(field, value, file):
    layers = layers_in(file)
    layers["head"]["terms"][0][field] = value
    rewrite(file, layers=layers)
    with pytest.raises(FileError, match=r"header and tensors disagree.*head"):
        load_adapters(file)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("head/a", None),
        ("head/b", torch.zeros(9, 4)),
        ("head/b", torch.full((9, 3), float("nan"))),
        ("small/a", torch.zeros(6, 6)),
        ("small/a.scale", None),
        ("depthwise/a", torch.full((2, 5), 100, dtype=torch.int8)),
        ("small/a.scale", torch.ones(1, 6)),
        ("small/a.scale", torch.full((6, 1), float("inf"))),
        ("small/a.scale", torch.full((6, 1), float("nan"))),
        ("small/a.scale", torch.full((6, 1), 1e38)),
        ("small/a.scale", torch.full((6, 1), -1.0)),
        ("small/a.scale", torch.zeros(6, 1)),
        ("small/a.scale", torch.full((6, 1), 1e-40)),
        ("depthwise/a.scale", torch.ones(3, 1)),
        ("features.0.conv/a", torch.zeros(8, 4, 3, 3, dtype=torch.int8)),
        ("features.0.conv/b", torch.zeros(8, 2, 1, 1)),
        ("head/shift", None),
        ("stem/shift", torch.zeros(15)),
        ("stem/shift", torch.zeros(16, 1)),
        ("stem/shift", torch.zeros(16, dtype=torch.float64)),
        ("stem/shift", torch.full((16,), float("nan"))),
    ],
)
def test_tensors_that_do_not_fit_the_header_are_refused(key, tensor, file):
    rewrite(file, {key: tensor})
    name = key.split("/")[0]
    with pytest.raises(FileError, match=f"header and tensors disagree.*{name}"):
        load_adapters(file)


def test_other_tensors_or_notes_are_told_from_those_that_were_saved(file):
    rewrite(file, {"stem/shift": randn(16, seed=5)}, sealed=False)
    with pytest.raises(FileError, match=r"adapters\.safetensors: is damaged"):
        load_adapters(file)


@pytest.mark.parametrize("field", ["notes", "shifts", "versions"])
def test_the_checksum_holds_the_header_too(field, file):
    rewrite(file, sealed=False, **{field: '{"a": 1}'})
    with pytest.raises(FileError, match="is damaged"):
        load_adapters(file)


@pytest.mark.parametrize("notes", ["5", "[1]", "null", "[" * 10**5 + "]" * 10**5])
def test_notes_that_are_no_mapping_are_refused(notes, file):
    rewrite(file, notes=notes)
    with pytest.raises(FileError, match="header and tensors disagree"):
        load_adapters(file)


def test_equal_content_gives_equal_bytes(adapters, tmp_path):
    notes = {"one": 1, "two": {"a": 1, "b": 2}}
    reordered = {"two": {"b": 2, "a": 1}, "one": 1}
    written = set()
    for index, each in enumerate(4 * [notes, reordered]):
        path = tmp_path / f"{index}.safetensors"
        save_adapters(path, adapters, {"head": torch.ones(9)}, each)
        written.add(path.read_bytes())
    assert len(written) == 1


def test_notes_with_nan_are_refused(adapters, tmp_path):
    with pytest.raises(CoRaError, match="notes: cannot be written as JSON"):
        save_adapters(tmp_path / "a", adapters, notes={"kl": float("nan")})
    assert not list(tmp_path.iterdir())


def test_scales_that_could_not_be_read_back_are_not_written(adapters, tmp_path):
    tiny = adapters["small"].scaled(1e-39)
    with pytest.raises(CoRaError, match=r"small: its adapter has a scale of"):
        save_adapters(tmp_path / "a.safetensors", {"small": tiny})
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(adapters, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        save_adapters(tmp_path / "nowhere" / "a.safetensors", adapters)


def test_a_write_that_fails_midway_leaves_the_old_file_and_no_other(file):
    before = file.read_bytes()
    large = make_adapter(randn(300, 300), Operation(), 20, Weighting())
    with full_disk(), pytest.raises(OSError):
        save_adapters(file, {"fc": large})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_notes_that_are_not_json_leave_the_old_file_and_no_other(adapters, file):
    before = file.read_bytes()
    with pytest.raises(CoRaError, match="notes"):
        save_adapters(file, adapters, notes={"model": object()})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
