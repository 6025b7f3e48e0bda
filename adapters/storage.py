"""Adapters in a file: safetensors with a JSON header, written whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cora_plugin.adapters.adapter import Adapter, Term, flat_name
from cora_plugin.adapters.content import CHECKSUM, checksum, content
from cora_plugin.adapters.errors import CoRaError, FileError
from cora_plugin.adapters.files import whole_file
from cora_plugin.adapters.fingerprint import Fingerprint
from cora_plugin.adapters.form import Form, earlier_fields
from cora_plugin.adapters.quantized import FLOAT_BITS, QuantizedTensor

FORMAT = "cora-plugin adapters 4"
ONE_TERM = "cora-plugin adapters 3"
"""The format of version 0.1, whose adapters have one term."""
EARLIER_FORMATS = ("cora-plugin adapters 1", "cora-plugin adapters 2")
"""Formats that are not read any more."""
ROUNDING = "rounding_shift"
"""Key of an adapter's rounding shift, which files may lack."""


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    shifts: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters, and the constants that correct biases, by layer name.

    The JSON header holds, for each adapter, the kind, rank and bits of its terms, the
    shape and groups of its layer's weight and the fingerprint of the quantized weight;
    for each shift, its length; and the versions of the packages that wrote the file,
    the caller's `notes`, and a checksum over all of it. An adapter's `rounding_shift`
    is stored with its tensors. Equal content makes equal bytes.

    Raises:
        CoRaError: The notes are not JSON, or an adapter's scales cannot be read back.
        OSError: The folder is missing, full or read-only; no partial file is left.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, adapter in adapters.items():
        for tensor in adapter.tensors.values():
            problem = _wrong_scale(tensor)
            if problem is not None:
                raise CoRaError(f"{name}: its adapter {problem}; apply CoRa anew")
        layers[name] = {
            "weight_shape": list(adapter.weight_shape),
            "groups": adapter.groups,
            "terms": [form.fields for form in adapter.forms],
            "fingerprint": adapter.fingerprint and asdict(adapter.fingerprint),
        }
        for key, tensor in adapter.tensors.items():
            tensors[f"{name}/{key}"] = _own(tensor.values)
            if tensor.scale is not None:
                tensors[f"{name}/{key}.scale"] = _own(tensor.scale)
        if adapter.rounding_shift is not None:
            tensors[f"{name}/{ROUNDING}"] = _own(adapter.rounding_shift.float())
    outputs: dict[str, int] = {}
    for name, shift in (shifts or {}).items():
        outputs[name] = shift.numel()
        tensors[f"{name}/shift"] = _own(shift.reshape(-1).float())
    try:
        text = json.dumps(dict(notes or {}), sort_keys=True, allow_nan=False)
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
        Path(temporary).write_bytes(content(tensors, header))


def _own(tensor: Tensor) -> Tensor:
    """A contiguous copy: safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_adapters(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Adapter], dict[str, Tensor], dict[str, Any]]:
    """Read what `save_adapters` wrote; no toolkit is needed.

    Returns:
        Adapters and shifts [m], float32, by layer name, and the notes.

    Raises:
        FileError: The file is damaged or holds no adapters.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise FileError(f"{path}: not a readable safetensors file: {error}") from error
    if header.get("format") in EARLIER_FORMATS:
        raise FileError(
            f"{path}: was written by an earlier version, whose files are not read any "
            "more; apply CoRa again and save its adapters anew"
        )
    if header.get("format") not in (FORMAT, ONE_TERM):
        raise FileError(
            f"{path}: holds {header.get('format', 'no adapters')!r}, not {FORMAT!r}; "
            "pass a file that save_adapters wrote"
        )
    current = header["format"] == FORMAT
    if current and header.pop(CHECKSUM, None) != checksum(tensors, header):
        raise FileError(
            f"{path}: is damaged, for its checksum is another; copy or save it again"
        )
    forms = _forms if current else _one_form
    try:
        layers = json.loads(header["layers"])
        notes = json.loads(header["notes"])
        if not isinstance(notes, dict):
            raise ValueError(f"its notes are {notes!r:.40}, not a mapping")
        adapters = {
            name: _read(name, row, forms, tensors) for name, row in layers.items()
        }
        shifts = {
            name: _read_tensor(f"{name}/shift", tensors, FLOAT_BITS, (size,)).values
            for name, size in json.loads(header["shifts"]).items()
        }
    except (
        AttributeError,
        KeyError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise FileError(f"{path}: its header and tensors disagree: {error}") from error
    return adapters, shifts, notes


def _read(
    name: str,
    row: dict[str, Any],
    forms: Callable[[dict[str, Any]], list[Form]],
    tensors: dict[str, Tensor],
) -> Adapter:
    """One adapter, once everything that the header says of it has been checked."""
    try:
        made_for = row["fingerprint"] and Fingerprint.read(row["fingerprint"])
        terms = []
        for index, form in enumerate(forms(row)):
            scales = form.scale_shapes
            stored = {
                key: _read_tensor(
                    f"{name}/{flat_name(key, index)}",
                    tensors,
                    form.bits,
                    shape,
                    scales.get(key),
                )
                for key, shape in form.shapes.items()
            }
            terms.append(Term(form, stored))
        key, rounding = f"{name}/{ROUNDING}", None
        if key in tensors:
            outputs = tuple(row["weight_shape"][:1])
            rounding = _read_tensor(key, tensors, FLOAT_BITS, outputs).values
        return Adapter(tuple(terms), made_for, rounding)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _forms(row: dict[str, Any]) -> list[Form]:
    """The forms that a row of the header tells of."""
    shape, groups = tuple(row["weight_shape"]), row["groups"]
    return [Form.read(fields, shape, groups) for fields in row["terms"]]


def _one_form(row: dict[str, Any]) -> list[Form]:
    """The one form of a row of version 0.1, which gave bits by tensor."""
    given = dict(row["bits"])
    term = earlier_fields(row["kind"], row["rank"], given["a"])
    (form,) = _forms({**row, "terms": [term]})
    if given != dict.fromkeys(form.shapes, form.bits):
        raise ValueError(
            f"has tensors of bits {given} where it should have {[*form.shapes]}, of "
            "the same bits"
        )
    return [form]


def _read_tensor(
    key: str,
    tensors: dict[str, Tensor],
    bits: int,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...] | None = None,
) -> QuantizedTensor:
    values, scale = tensors[key], tensors.get(f"{key}.scale")
    if tuple(values.shape) != shape:
        raise ValueError(f"{key} is {list(values.shape)}, not {list(shape)}")
    if scale_shape is None:
        if scale is not None or values.dtype != torch.float32:
            raise ValueError(f"{key} should be float32, without a scale")
    else:
        if scale is None or values.dtype != torch.int8 or scale.dtype != torch.float32:
            raise ValueError(f"{key} should be int8 with scales in float32")
        if int(values.int().abs().max()) >= 2 ** (bits - 1):
            raise ValueError(f"{key} does not hold integers of {bits} bits")
        if tuple(scale.shape) != scale_shape:
            raise ValueError(f"{key} has scales of shape {list(scale.shape)}")
    if not torch.isfinite(values if scale is None else scale).all():
        raise ValueError(f"{key} holds NaN or inf")
    stored = QuantizedTensor(values, scale, bits)
    problem = _wrong_scale(stored)
    if problem is not None:
        raise ValueError(f"{key} {problem}")
    return stored


def _wrong_scale(stored: QuantizedTensor) -> str | None:
    """What is wrong with a tensor's scales, in words, or None."""
    if stored.scale is None:
        return None
    limits = torch.finfo(torch.float32)
    largest = limits.max / 2 ** (stored.bits - 1)
    fine = (stored.scale >= limits.smallest_normal) & (stored.scale <= largest)
    if bool(fine.all()):
        return None
    wrong = float(stored.scale[~fine][0])
    return f"has a scale of {wrong:g}, which no quantizer makes"
