"""What every toolkit owes several processes; a subclass names the toolkit."""

import pytest
import sharing
import torch


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without processes"
)
class Shares:
    """Two processes find for a model of the toolkit what one does."""

    toolkit = None

    @pytest.fixture(scope="class")
    def both(self, tmp_path_factory):
        """The folders of two processes."""
        return sharing.run(tmp_path_factory.mktemp("both"), self.toolkit)

    @pytest.mark.parametrize("case", sharing.TOOLKIT_CASES)
    def test_two_processes_find_the_adapters_of_one(self, case, both, tmp_path):
        sharing.write_toolkit(self.toolkit, tmp_path / "one", case)
        sharing.agree(tmp_path / "one", [folder / case for folder in both])
