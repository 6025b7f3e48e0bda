"""Several processes find what one does, and fail together."""

import json

import pytest
import sharing
import torch

from cora_plugin import processes

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without processes"
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folders of two processes."""
    return sharing.run(tmp_path_factory.mktemp("both"), "plain")


@pytest.mark.parametrize("case", sharing.CASES)
def test_two_processes_find_the_adapters_of_one(case, both, tmp_path):
    sharing.write_plain(tmp_path / "one", case)
    kept = sharing.figures_of(tmp_path / "one")["kept"]
    assert "adapters" in kept
    if "refine" in case:
        assert "refinement" in kept
    sharing.agree(tmp_path / "one", [folder / case for folder in both])


def test_bit_widths_are_planned_together(both):
    plans = {(folder / "plan").read_text() for folder in both}
    assert plans == {str(sharing.planned())}


def test_one_process_works_alone(both, tmp_path):
    sharing.write_plain(tmp_path / "one", "default")
    sharing.agree(tmp_path / "one", [both[0] / "alone"])
    assert not (both[1] / "alone").exists()


@pytest.mark.parametrize(
    "case, messages",
    [
        ("no data", ("at least one batch", "at least one batch")),
        ("nan", ("another one has failed", "item 3 holds NaN")),
        ("settings", ("seed: 0, and 1 in another", "seed: 1, and 0 in another")),
        ("models", ("give other outputs", "give other outputs")),
        ("metric", ("another one has failed", "ZeroDivisionError")),
    ],
)
def test_what_goes_wrong_in_one_does_in_all(case, messages, both):
    for folder, message in zip(both, messages, strict=True):
        error, adapters = json.loads((folder / "errors").read_text())[case]
        assert message in error
        assert not adapters


def test_a_process_says_what_it_waits_for(both):
    waiting, coming = ((folder / "late").read_text() for folder in both)
    assert waiting == (
        "process 0 waits for the others at 'ranks': all of them must call it, or one "
        "within `with cora_plugin.alone():`"
    )
    assert not coming


def test_a_process_that_is_gone_is_missed(both):
    error, adapters = json.loads((both[0] / "errors").read_text())["gone"]
    assert "ApartError: processes: batches: the others are gone" in error
    assert not adapters


def test_one_process_is_all_there_is():
    assert (processes.count(), processes.rank()) == (1, 0)
    ones = torch.ones(3)
    assert processes.add_up("ones", [ones], [2, 3]) == [2, 3]
    assert ones.tolist() == [1, 1, 1]
    assert processes.mine([1, 2, 3]) == [1, 2, 3]
    assert processes.gathered("things", "a") == ["a"]
    with pytest.raises(KeyError), processes.agreeing():
        raise KeyError
