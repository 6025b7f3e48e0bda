import os
from pathlib import Path

import pytest
from installed import install

from cora_plugin.integrations.toolkit import load_toolkit

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A toolkit of torch alone, and one that is absent, for cells' processes too."""
    folder = tmp_path / "installed"
    folder.mkdir()
    points = {"plain": "plain_toolkit:TOOLKIT", "absent": "absent_quantizer:TOOLKIT"}
    install(folder, monkeypatch, "plain-quantizer", points)
    path = os.pathsep.join([str(folder), str(SUPPORT)])
    monkeypatch.setenv("PYTHONPATH", path)
    # The small net is taught anew in each process: to the last digit, whatever `jobs`.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return load_toolkit("plain")
