import os
from pathlib import Path

import pytest

from cora_plugin.adapters.files import whole_file


def test_a_block_that_succeeds_replaces_the_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with whole_file(path) as temporary:
        Path(temporary).write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_no_other(kind, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(kind), whole_file(path) as temporary:
        Path(temporary).write_text("half of the n")
        raise kind
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_has_the_ending_that_writers_look_at(tmp_path):
    with whole_file(tmp_path / "model.onnx") as temporary:
        assert temporary.endswith(".onnx")


def test_a_new_file_has_the_permissions_that_open_would_give(tmp_path):
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "whole"):
        pass
    modes = {os.stat(tmp_path / name).st_mode for name in ("plain", "whole")}
    assert len(modes) == 1


def test_a_folder_is_no_file(tmp_path):
    with (
        pytest.raises(IsADirectoryError, match="it is a folder; name a file"),
        whole_file(tmp_path),
    ):
        pytest.fail("the block ran")
    assert list(tmp_path.parent.glob(f".{tmp_path.stem}*")) == []
