"""No flipped bit of an adapter file goes unseen; `--faults 500` tries as many."""

from random import Random

import pytest
import torch
from flipped import flipped

from cora_plugin.adapters import Operation, load_adapters, make_adapter, save_adapters
from cora_plugin.adapters.errors import FileError
from cora_plugin.adapters.factor import Weighting


def test_no_file_with_a_flipped_bit_is_loaded(tmp_path, faults):
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    adapter = make_adapter(weight, Operation(), 2, Weighting())
    path = tmp_path / "adapters.safetensors"
    save_adapters(path, {"fc": adapter}, {"fc": weight[:, 0]}, {"made": "by a test"})
    content, random = path.read_bytes(), Random(0)
    for _ in range(faults(100)):
        path.write_bytes(flipped(content, random))
        with pytest.raises(FileError):
            load_adapters(path)
