import json
import multiprocessing
import os
import signal
import sys

import pytest

from cora_plugin.adapters.errors import FileError
from cora_plugin.document import Document
from cora_plugin.recipe.folder import FILES, OWN, conflict, opened, written


def fill(staging, *names):
    """The files of a run, its report among them."""
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_text(name)
    report = json.dumps({FILES: [*names, "report.json"]})
    (staging / "report.json").write_text(report)


def run(folder, *names):
    with opened(Document(), folder) as staging:
        fill(staging, *names)


def test_a_run_replaces_the_files_of_the_one_before_and_no_others(tmp_path):
    out = tmp_path / "deep" / "out"
    run(out, "a.onnx", "sub/b.onnx", "ü.xml", "ü.bin")
    (out / "mine.txt").write_text("of the user")
    run(out, "a.onnx", "c.onnx")
    assert written(out) == ["a.onnx", "c.onnx", "mine.txt", "report.json"]
    assert not (out / "sub").exists()


def test_files_of_a_report_that_lists_no_files_go_by_its_exports(tmp_path):
    (tmp_path / "a.onnx").touch()
    old = {"exports": [{"path": "a.onnx"}, {"path": "../outside"}]}
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "outside").touch()
    (out / "report.json").write_text(json.dumps(old))
    (out / "a.onnx").touch()
    run(out, "b.onnx")
    assert written(out) == ["b.onnx", "report.json"]
    assert (tmp_path / "outside").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_nothing(error, tmp_path):
    run(tmp_path / "out", "a.onnx")
    before = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(error), opened(Document(), out) as staging:
            fill(staging, "b.onnx")
            raise error
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_looking_leaves_nothing(tmp_path):
    with opened(Document(), tmp_path / "a" / "b", keep=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_runs_cannot_mix(tmp_path):
    with opened(Document(), tmp_path) as staging:
        fill(staging, "a.onnx")
        with (
            pytest.raises(FileError, match="output: another run is writing to"),
            opened(Document(), tmp_path),
        ):
            pytest.fail("both write")
    assert written(tmp_path) == ["a.onnx", "report.json"]
    run(tmp_path, "b.onnx")
    assert written(tmp_path) == ["b.onnx", "report.json"]


def killed(steps, out, *names):
    """A run that ends after so many steps of Python, as by SIGKILL."""

    def counted(_frame, _event, _arg):
        nonlocal steps
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return counted

    sys.settrace(counted)
    run(out, *names)


@pytest.mark.parametrize("steps", [0, 150, 300, 500])
def test_what_a_killed_run_left_goes_or_is_completed(steps, tmp_path, faults):
    """Killed after any number of steps: the next run leaves one run's files."""
    out = tmp_path / "out"
    forked = multiprocessing.get_context("fork")  # It has imported all there is.
    for extra in range(0, 150, 150 // faults(15)):
        run(out, "a.onnx", "old.onnx")
        process = forked.Process(
            target=killed, args=(steps + extra, out, "a.onnx", "b.onnx")
        )
        process.start()
        process.join()
        with opened(Document(), out, keep=False):
            pass
        left = (process.exitcode, written(out))
        assert left in (
            (-signal.SIGKILL, ["a.onnx", "old.onnx", "report.json"]),
            (-signal.SIGKILL, ["a.onnx", "b.onnx", "report.json"]),
            (0, ["a.onnx", "b.onnx", "report.json"]),
        )
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *((name, "in the way of the run's own files") for name in OWN),
        ("REPORT.JSON", "in the way of the run's own files"),
        ("./report.txt", "in the way of the run's own files"),
        ("report.json/a", "in the way of the run's own files"),
        (".", "is the output folder itself"),
        ("./", "is the output folder itself"),
        ("../a", "leaves the output folder"),
        ("a/../../b", "leaves the output folder"),
        ("/a", "leaves the output folder"),
        ("C:\\a", "leaves the output folder"),
        ("..\\a", "leaves the output folder"),
        (".cora-part/a", "are the run's own"),
        ("./a.onnx", "a.onnx is written twice"),
        ("A.onnx", "A.onnx is written twice"),
        ("m.bin", "m.bin is written twice"),
        ("a.onnx/b", "a.onnx/b and a.onnx cannot both be files"),
        ("sub", "sub and sub/c cannot both be files"),
    ],
)
def test_a_path_that_cannot_be_is_refused(path, message):
    assert message in conflict(path, ["a.onnx", "m.xml", "sub/c"])


def test_a_path_that_can_be_is_not_refused():
    for path in ("b.onnx", "sub/d", "reports/report.json", "a.onnx2", "n.xml"):
        assert conflict(path, ["a.onnx", "m.xml", "sub/c"]) is None
