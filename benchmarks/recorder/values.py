"""Models, reports and tensors as plain values that can be compared."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NUMBERS = 200
"""How many numbers of an output are kept, to tell how large a difference is."""

_SUMS = (
    "equivalent_bits_before equivalent_bits bytes adapter_parameters budget_used "
    "budget_allowed budget_unit images held_out search_iterations search_images"
).split()


def digest(data: bytes) -> str:
    """The sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def of_file(path: Path) -> dict[str, Any]:
    """A file's bytes; names, order and versions are among them."""
    data = path.read_bytes()
    size = len(data)
    if path.suffix == ".safetensors":
        # The package writes its metadata in another order at each run.
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:end]), sort_keys=True)
        data = header.encode() + data[end:]
    return {"sha256": digest(data), "bytes": size}


def of_arrays(arrays: Iterable[np.ndarray]) -> dict[str, Any]:
    """What some arrays hold, whatever they are called and in whatever order."""
    found = [(a.dtype.name, list(a.shape), np.ascontiguousarray(a)) for a in arrays]
    hashes = sorted(digest(f"{t} {s} ".encode() + a.tobytes()) for t, s, a in found)
    return {
        "count": len(found),
        "bytes": sum(a.nbytes for _, _, a in found),
        "sha256": digest("".join(hashes).encode()),
    }


def of_outputs(values: np.ndarray, decimals: int | None = None) -> dict[str, Any]:
    """Outputs to the last bit, or rounded: a digest of all and the first numbers."""
    if decimals is not None:
        values = np.round(values.astype(np.float64), decimals) + 0.0  # no -0
    values = np.ascontiguousarray(values)
    return {
        "shape": list(values.shape),
        "sha256": digest(values.tobytes()),
        "first": values.flatten()[:NUMBERS].tolist(),
    }


@torch.no_grad()
def of_model(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """A model's outputs, to the last bit."""
    output = model.eval()(images)
    output = getattr(output, "value", output)  # of a QuantTensor
    return of_outputs(output.numpy())


def of_report(report: Any) -> dict[str, Any]:
    """The figures of a report, or of what a report's JSON holds; no times, no texts.

    A figure that a report lacks is null, so that its loss shows.
    """
    whole: Mapping[str, Any] = report if isinstance(report, dict) else report.to_dict()
    fit = {
        name: whole.get(f"refine_{name}", whole.get(f"fit_{name}"))
        for name in ("iterations", "images")
    }
    return {
        "layers": {row["name"]: _layer(row) for row in whole["layers"]},
        "skipped": sorted(whole["skipped"]),
        "steps": [dict(step) for step in whole["steps"]],
        **{name: whole[name] for name in ("before", "after", "activations")},
        **{name: whole.get(name) for name in _SUMS},
        "refinement": fit,
        "sweep": [dict(point) for point in whole["sweep"]],
    }


def _layer(row: Mapping[str, Any]) -> dict[str, Any]:
    kind = "whole" if row["kind"] == "full" else row["kind"]  # two names for one kind
    return {
        **{name: value for name, value in row.items() if name != "name"},
        "kind": kind,
        "spectrum": list(row["spectrum"]),
    }
