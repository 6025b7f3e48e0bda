"""Any adapter file and any checkpoint is read, or refused with one line.

Damage is covered by checksums; so what is changed here has a right one, as a file that
another program wrote. `--faults` says how many are tried.
"""

import json
from random import Random

import pytest
import torch
from flipped import flipped
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cora_plugin import CoRaError
from cora_plugin.adapters import (
    Form,
    Operation,
    load_adapters,
    make_adapter,
    save_adapters,
)
from cora_plugin.adapters.content import CHECKSUM, content
from cora_plugin.adapters.factor import Weighting
from cora_plugin.adapters.factors import series
from cora_plugin.qat import checkpoint
from cora_plugin.search.checkpoint import TAG, State
from cora_plugin.states import write_state

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.floats()
    | st.sampled_from(["low-rank", "a", "fc", "ünï", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["terms", "rank", "x"]), inner, max_size=2)
    ),
    max_leaves=5,
)
PATHS = st.lists(st.integers(0, 7), max_size=5)
PLAIN = JSON | st.builds(torch.zeros, st.integers(0, 3))


@pytest.fixture
def examples(faults):
    """How many examples hypothesis makes."""

    def many(test):
        quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
        return settings(max_examples=faults(60), suppress_health_check=quiet)(test)

    return many


@pytest.fixture
def written(tmp_path):
    """The tensors and the metadata of an adapter file, and its path."""
    path = tmp_path / "adapters.safetensors"
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    form = Form.whole(3, (6, 8), 1)
    made = {
        "fc": make_adapter(weight, Operation(), 2, Weighting()),
        "a[0]/b": series(weight, (form, form)),
    }
    save_adapters(path, made, {"fc": weight[:, 0]}, {"made": "by a test"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    del metadata[CHECKSUM]
    return path, tensors, metadata


def refused_or(read):
    try:
        read()
    except CoRaError as error:
        assert str(error) and "\n" not in str(error)


def put(value, path, new):
    """A copy of plain values with one of them replaced; the path wraps around."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    copied = value.copy()
    copied[key] = put(value[key], path[1:], new)
    return copied


def test_any_header_is_read_or_refused(written, examples):
    path, tensors, metadata = written

    @examples
    @given(st.sampled_from(["layers", "shifts", "notes"]), PATHS, JSON)
    def check(part, place, new):
        changed = json.dumps(put(json.loads(metadata[part]), place, new))
        path.write_bytes(content(tensors, {**metadata, part: changed}))
        refused_or(lambda: load_adapters(path))

    check()


def test_any_tensors_are_read_or_refused(written, examples):
    path, tensors, metadata = written
    shapes = st.lists(st.integers(0, 9), max_size=3)
    dtypes = st.sampled_from([torch.int8, torch.float32, torch.float16, torch.bool])
    values = st.sampled_from([0, 1, -3, 127])
    other = st.builds(
        lambda shape, dtype, value: torch.full(shape, value).to(dtype),
        shapes,
        dtypes,
        values,
    )

    @examples
    @given(st.sampled_from(sorted(tensors)), st.none() | other)
    def check(name, new):
        changed = {key: tensor for key, tensor in tensors.items() if key != name}
        if new is not None:
            changed[name] = new
        path.write_bytes(content(changed, metadata))
        refused_or(lambda: load_adapters(path))

    check()


def test_any_bytes_are_refused_as_adapters(tmp_path, examples):
    path = tmp_path / "adapters.safetensors"

    @examples
    @given(st.binary(max_size=64))
    def check(written):
        path.write_bytes(written)
        with pytest.raises(CoRaError):
            load_adapters(path)

    check()


def search():
    parameter = torch.nn.Parameter(torch.ones(2))
    return State(torch.optim.Adam([parameter]), json.dumps({"seed": 0}))


def saved():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    return {
        "fingerprint": json.dumps({"seed": 0}),
        "iteration": 3,
        "parameters": [torch.zeros(2)],
        "optimizer": optimizer.state_dict(),
    }


def test_any_state_of_a_search_is_read_or_refused(tmp_path, examples):
    path = str(tmp_path / "search.pt")

    @examples
    @given(PATHS, PLAIN | st.text(max_size=5))
    @example([3, 1], torch.zeros(1))  # A group of the optimizer that is a number.
    def check(place, new):
        write_state(path, TAG, put(saved(), place, new))
        refused_or(lambda: search().resume(path, 10))

    check()
    write_state(path, TAG, saved())
    assert search().resume(path, 10) == 3


def test_any_state_of_a_training_is_read_or_refused(tmp_path, examples):
    path, made_for = str(tmp_path / "qat.pt"), {"steps": 3}
    whole = {"made for": json.dumps(made_for), "model": {"w": torch.zeros(2)}}

    @examples
    @given(PATHS, PLAIN)
    def check(place, new):
        write_state(path, checkpoint.TAG, put(whole, place, new))
        refused_or(lambda: checkpoint.load(path, made_for))

    check()


def test_no_checkpoint_with_a_flipped_bit_is_read(tmp_path, faults):
    path, random = tmp_path / "search.pt", Random(0)
    write_state(str(path), TAG, saved())
    content, tried = path.read_bytes(), search()
    for _ in range(faults(50)):
        path.write_bytes(flipped(content, random))
        with pytest.raises(CoRaError):
            tried.resume(str(path), 10)
