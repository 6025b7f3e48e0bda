import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

SUPPORT = Path(two_processes.__file__).parent


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without processes"
)
def test_two_processes_give_the_rates_of_one(tmp_path):
    meet = tmp_path / "meet"
    path = os.pathsep.join([str(SUPPORT), *sys.path])
    both = [
        subprocess.Popen(
            [sys.executable, two_processes.__file__, str(rank), str(meet)],
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    assert [each.wait(timeout=240) for each in both] == [0, 0]
    found = [json.loads(Path(f"{meet}-{rank}").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    expected = two_processes.rates(slice(None))
    assert sum(rate for rate, _ in expected) > 0
    for (rate, lr), (one, other) in zip(found[0], expected, strict=True):
        # Half a batch each sums up in another order: one weight of 192 may differ.
        assert rate == pytest.approx(one, abs=1.01 / 192)
        assert lr == pytest.approx(other, rel=1e-3)
