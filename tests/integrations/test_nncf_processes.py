"""Two processes find for a model of NNCF what one does."""

import pytest
import sharing
import torch

CASES = "default", "butterworth"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of two processes."""
    return sharing.run(tmp_path_factory.mktemp("both"), "nncf")


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without processes"
)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_find_the_adapters_of_one(case, both, tmp_path):
    sharing.write_toolkit("nncf", tmp_path / "one", case)
    sharing.agree(tmp_path / "one", [folder / case for folder in both])
