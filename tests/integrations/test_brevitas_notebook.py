"""The notebook of docs/notebooks runs, and shows what it says."""

from onnx_files import packed_files_run
from run_notebook import ran


@packed_files_run
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names, values = ran("brevitas.ipynb")
    assert values[0] > 0.9  # The float network has learned something.
    assert names["after"] < 0.5 * names["before"]
    assert names["right"] > 0.9
    assert "is right about" in capsys.readouterr().out
