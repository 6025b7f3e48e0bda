"""Adapters in a file: safetensors with a JSON header, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cora_plugin.adapters.adapter import Adapter, Kind, factor_shapes
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.files import whole_file
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.adapters.quantized import FLOAT_BITS, QuantizedTensor

FORMAT = "cora-plugin adapters 3"
EARLIER_FORMATS = ("cora-plugin adapters 1", "cora-plugin adapters 2")


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    shifts: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters, and the constants that correct biases, by layer name.

    The header, JSON, tells of each adapter its kind, rank, bits, the shape of its
    layer's weight and the fingerprint of what it was made for; of each shift, one
    number an output, how many; of the file, the versions that wrote it and the
    caller's `notes`.

    Raises:
        CoRaError: The notes are not JSON.
        OSError: The folder is missing, full or read-only; no partial file is left.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, adapter in adapters.items():
        layers[name] = {
            "kind": str(adapter.kind),
            "rank": adapter.rank,
            "weight_shape": list(adapter.weight_shape),
            "groups": adapter.groups,
            "bits": {key: t.bits for key, t in adapter.tensors.items()},
            "fingerprint": adapter.fingerprint and asdict(adapter.fingerprint),
        }
        for key, tensor in adapter.tensors.items():
            tensors[f"{name}/{key}"] = _own(tensor.values)
            if tensor.scale is not None:
                tensors[f"{name}/{key}.scale"] = _own(tensor.scale)
    outputs: dict[str, int] = {}
    for name, shift in (shifts or {}).items():
        outputs[name] = shift.numel()
        tensors[f"{name}/shift"] = _own(shift.reshape(-1).float())
    try:
        text = json.dumps(dict(notes or {}))
    except (TypeError, ValueError) as error:
        raise CoRaError(f"notes: cannot be written as JSON: {error}") from error
    versions = {"cora-plugin": version("cora-plugin"), "torch": torch.__version__}
    header = {
        "format": FORMAT,
        "versions": json.dumps(versions),
        "layers": json.dumps(layers),
        "shifts": json.dumps(outputs),
        "notes": text,
    }
    with whole_file(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy: safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_adapters(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Adapter], dict[str, Tensor], dict[str, Any]]:
    """Read what `save_adapters` wrote; torch is all it takes.

    Returns:
        Adapters and shifts [m], float32, by layer name, and the notes.

    Raises:
        CoRaError: The file is corrupt or is not one of adapters.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise CoRaError(f"{path}: not a readable safetensors file: {error}") from error
    if header.get("format") in EARLIER_FORMATS:
        raise CoRaError(
            f"{path}: was written by an earlier version, whose files are not read any "
            "more; apply CoRa again and save its adapters anew"
        )
    if header.get("format") != FORMAT:
        raise CoRaError(
            f"{path}: holds {header.get('format', 'no adapters')!r}, not {FORMAT!r}; "
            "pass a file that save_adapters wrote"
        )
    try:
        layers = json.loads(header["layers"])
        notes = json.loads(header["notes"])
        adapters = {name: _read(name, row, tensors) for name, row in layers.items()}
        shifts = {
            name: _read_tensor(f"{name}/shift", tensors, (size,), FLOAT_BITS).values
            for name, size in json.loads(header["shifts"]).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CoRaError(f"{path}: its header and tensors disagree: {error}") from error
    return adapters, shifts, notes


def _read(name: str, row: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    """One adapter, once everything that the header says of it has been checked."""
    try:
        kind, bits = Kind(row["kind"]), dict(row["bits"])
        rank, groups, shape = row["rank"], row["groups"], tuple(row["weight_shape"])
        sizes = (rank, groups, *shape, *bits.values())
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{sizes} should be whole numbers above 0")
        if len(shape) < 2 or shape[0] % groups:
            raise ValueError(f"{groups} groups do not divide a weight {list(shape)}")
        if kind is Kind.SHARED_BASIS and (groups == 1 or shape[1] != 1):
            raise ValueError(f"a weight {list(shape)} is not depthwise")
        made_for = row["fingerprint"] and Fingerprint.read(row["fingerprint"])
        expected = factor_shapes(kind, rank, shape, groups)
        if bits.keys() != expected.keys():
            raise ValueError(f"has {[*bits]} where it should have {[*expected]}")
        stored = {
            key: _read_tensor(f"{name}/{key}", tensors, expected[key], bits[key])
            for key in expected
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return Adapter(kind, rank, stored["a"], stored.get("b"), shape, groups, made_for)


def _read_tensor(
    key: str, tensors: dict[str, Tensor], shape: tuple[int, ...], bits: int
) -> QuantizedTensor:
    values, scale = tensors[key], tensors.get(f"{key}.scale")
    if tuple(values.shape) != shape:
        raise ValueError(f"{key} is {list(values.shape)}, not {list(shape)}")
    if bits == FLOAT_BITS:
        if scale is not None or values.dtype != torch.float32:
            raise ValueError(f"{key} should be float32, without a scale")
    else:
        if scale is None or values.dtype != torch.int8 or scale.dtype != torch.float32:
            raise ValueError(f"{key} should be int8 with scales in float32")
        if not 2 <= bits <= 8 or int(values.int().abs().max()) >= 2 ** (bits - 1):
            raise ValueError(f"{key} does not hold integers of {bits} bits")
        count = 1 if key.endswith("/b") else shape[0]
        if tuple(scale.shape) != (count, *[1] * (len(shape) - 1)):
            raise ValueError(f"{key} has scales of shape {list(scale.shape)}")
    if not torch.isfinite(values if scale is None else scale).all():
        raise ValueError(f"{key} holds NaN or inf")
    return QuantizedTensor(values, scale, bits)
