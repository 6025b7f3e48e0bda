import errno
import os
import subprocess
import sys
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


def test_the_error_of_a_writer_that_removed_its_file_is_told(tmp_path):
    with (
        pytest.raises(OSError, match="see that the disk has room"),
        whole_file(tmp_path / "model.xml") as temporary,
    ):
        os.unlink(temporary)
        raise OSError("cannot write model.xml: see that the disk has room")


def test_an_error_of_the_system_names_the_file(tmp_path):
    path = tmp_path / "model.onnx"
    with (
        pytest.raises(OSError, match=r"cannot write .*model\.onnx: No space left"),
        whole_file(path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_takes_no_files_is_told_by_the_files_name(tmp_path):
    path = tmp_path / f"{'a' * 240}.onnx"  # A longer name has no room.
    with (
        pytest.raises(OSError, match=r"^cannot write .*/a{240}\.onnx: File name too"),
        whole_file(path),
    ):
        pytest.fail("the block ran")


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    path = tmp_path / "model.onnx"
    code = f"""
import os
from cora_plugin.adapters.files import whole_file
with whole_file({str(path)!r}) as temporary:
    open(temporary, "w").write("half of it")
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    with whole_file(tmp_path / "other.onnx"), whole_file(path) as temporary:
        # Other files' temporaries, and those of living processes, stay.
        assert not left.exists()
        with whole_file(path):
            assert Path(temporary).exists()
    assert len(list(tmp_path.iterdir())) == 2
