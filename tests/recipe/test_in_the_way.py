"""What stands in an output folder and is no run's is not lost, nor found too late."""

import json
import os

import pytest

from cora_plugin.adapters.errors import FileError
from cora_plugin.document import Document
from cora_plugin.recipe import Recipe
from cora_plugin.recipe.folder import FILES, OWN, WHOLE, in_the_way, opened, written


def earlier(folder, *names):
    """A folder with the files of a run."""
    files = [*names, *OWN]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of a run")
    report = {"recipe": {}, "rows": [], FILES: files}
    (folder / "report.json").write_text(json.dumps(report))


def test_a_runs_files_may_be_replaced(tmp_path):
    assert in_the_way(tmp_path / "new", ["a.onnx", "sub/m.xml"]) is None
    earlier(tmp_path, "a.onnx", "sub/m.xml", "sub/m.bin")
    (tmp_path / "mine.txt").write_text("of the user")
    assert in_the_way(tmp_path, ["./a.onnx", "sub/m.xml", "b.onnx"]) is None


def test_a_report_without_a_list_of_files_will_do(tmp_path):
    earlier(tmp_path)
    old = {"recipe": {}, "rows": [], "exports": [{"path": "a.onnx"}]}
    (tmp_path / "report.json").write_text(json.dumps(old))
    (tmp_path / "a.onnx").touch()
    assert in_the_way(tmp_path, ["a.onnx"]) is None


@pytest.mark.parametrize(
    ("there", "key"),
    [
        ("a.onnx", "a.onnx"),
        ("sub/m.xml", "sub/m.xml"),
        ("sub/m.bin", "sub/m.xml"),
        *((name, name) for name in OWN),
    ],
)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_that_no_run_wrote_is_named(there, key, kind, tmp_path):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    if kind == "file":
        (tmp_path / there).write_text("{}")
    else:
        (tmp_path / there).symlink_to("nowhere")
    name, problem = in_the_way(tmp_path, ["a.onnx", "sub/m.xml"])
    assert name == key
    assert problem.startswith(f"{tmp_path / there} is there, and no earlier run")


def test_what_cannot_be_replaced_is_named(tmp_path):
    (tmp_path / "report.html").mkdir()
    assert in_the_way(tmp_path, ["a.onnx"]) == (
        "report.html",
        f"{tmp_path / 'report.html'} is a folder; name another file",
    )
    (tmp_path / "sub").write_text("of the user")
    name, problem = in_the_way(tmp_path, ["sub/deep/a.onnx"])
    assert name == "sub/deep/a.onnx"
    assert problem == f"{tmp_path / 'sub'} is a file; name another file"


def test_what_comes_in_the_way_of_a_whole_run_is_told_and_loses_nothing(tmp_path):
    def whole():
        with opened(Document(), tmp_path) as staging:
            (staging / "a.onnx").write_text("new")
            files = {FILES: ["a.onnx", "report.json"]}
            (staging / "report.json").write_text(json.dumps(files))
            (tmp_path / "a.onnx").mkdir()

    with pytest.raises(FileError) as error:
        whole()
    said = str(error.value)
    assert "a.onnx" in said and f"all of it is in {WHOLE}" in said
    with pytest.raises(FileError, match=r"a\.onnx"), opened(Document(), tmp_path):
        pytest.fail("it is still in the way")
    (tmp_path / "a.onnx").rmdir()
    with opened(Document(), tmp_path, keep=False):
        pass
    assert written(tmp_path) == ["a.onnx", "report.json"]


def test_the_output_folder_may_hold_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("WHERE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for output in ("$WHERE/out", "~/out"):
        values = {
            "model": {"factory": "a:b"},
            "data": {"glob": "*.png"},
            "toolkit": "brevitas",
            "output": output,
        }
        recipe = Recipe.of(Document("", values))
        assert recipe.output == os.path.join(tmp_path, "out")
