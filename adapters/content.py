"""The bytes of an adapter file, and the checksum that tells when they were damaged."""

import hashlib
import json
import struct
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor

CHECKSUM = "checksum"
"""Key of the checksum in the header's metadata."""


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over all tensors, with their names, and all other metadata."""
    digest = hashlib.sha256()
    parts = [*sorted(metadata.items())]
    parts += [
        (key, f"{tensor.dtype} {list(tensor.shape)}")
        for key, tensor in sorted(tensors.items())
    ]
    digest.update(json.dumps(parts).encode())
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of these tensors, with their checksum among the metadata.

    The same tensors and metadata give the same bytes: safetensors itself writes the
    metadata in an order that changes from one call to the next.
    """
    whole = {**metadata, CHECKSUM: checksum(tensors, metadata)}
    plain = save(dict(tensors))
    (length,) = struct.unpack("<Q", plain[:8])
    header = {"__metadata__": whole, **json.loads(plain[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at a multiple of 8.
    return struct.pack("<Q", len(text)) + text + plain[8 + length :]
