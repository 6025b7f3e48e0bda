"""Adapters in a file: safetensors with a JSON header, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cora_plugin.adapters.adapter import Adapter, Kind
from cora_plugin.adapters.errors import CoRaError
from cora_plugin.adapters.files import whole_file
from cora_plugin.adapters.quantized import QuantizedTensor

FORMAT = "cora-plugin adapters 1"


def save_adapters(
    path: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters by layer name; `notes` is JSON that travels in the header.

    Raises:
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
        }
        for key, tensor in adapter.tensors.items():
            tensors[f"{name}/{key}"] = tensor.values.contiguous()
            if tensor.scale is not None:
                tensors[f"{name}/{key}.scale"] = tensor.scale.contiguous()
    header = {
        "format": FORMAT,
        "layers": json.dumps(layers),
        "notes": json.dumps(dict(notes or {})),
    }
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def load_adapters(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Adapter], dict[str, Any]]:
    """Read adapters and notes that `save_adapters` wrote; torch is all it takes.

    Raises:
        CoRaError: The file is corrupt or is not one of adapters.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CoRaError(f"{path}: not a readable safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise CoRaError(
            f"{path}: holds {header.get('format', 'no adapters')!r}, not {FORMAT!r}; "
            "pass a file that save_adapters wrote"
        )
    try:
        layers = json.loads(header["layers"])
        adapters = {name: _read(name, row, tensors) for name, row in layers.items()}
        notes = json.loads(header["notes"])
    except (KeyError, TypeError, ValueError) as error:
        raise CoRaError(f"{path}: its header and tensors disagree: {error}") from error
    return adapters, notes


def _read(name: str, row: dict[str, Any], tensors: dict[str, Tensor]) -> Adapter:
    stored = {
        key: QuantizedTensor(
            tensors[f"{name}/{key}"], tensors.get(f"{name}/{key}.scale"), bits
        )
        for key, bits in row["bits"].items()
    }
    adapter = Adapter(
        Kind(row["kind"]),
        row["rank"],
        stored["a"],
        stored.get("b"),
        tuple(row["weight_shape"]),
        row["groups"],
    )
    if tuple(adapter.merged().shape) != adapter.weight_shape:
        raise ValueError(f"{name} does not have shape {adapter.weight_shape}")
    return adapter
