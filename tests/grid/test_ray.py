"""Cells run on a Ray cluster; what a lost worker had is measured again, or a reason."""

import json
import os
import sys
import tempfile
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from small_recipe import written

from cora_plugin import CoRaError
from cora_plugin.cli import main
from cora_plugin.document import Document
from cora_plugin.grid import compare
from cora_plugin.grid.cells import cells
from cora_plugin.grid.folder import Folder
from cora_plugin.grid.schedule import Limits
from cora_plugin.grid.section import CompareSection

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")

FACTORIES = """
    import os, signal, time
    from pathlib import Path
    from small_recipe import net

    def lost(folder, times):
        "A net whose first cells take their worker on Ray with them."
        if len(list(Path(folder).iterdir())) < times:
            Path(folder, str(os.getpid())).touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        return net()

    def asleep(folder):
        "A net that takes longer than anyone waits."
        Path(folder, str(os.getpid())).touch()
        time.sleep(600)
"""


def recipe(tmp_path, lists, **sections):
    base = {"toolkit": "plain", "ptq": {}, "cora": {"regression": False}}
    data = {"factory": "small_recipe:images", "images": 24}
    whole = {**base, "data": data, "compare": lists, **sections}
    return written(tmp_path / "recipe.yaml", **whole)


def results(tmp_path):
    return json.loads((tmp_path / "out" / "comparison.json").read_text())


def factory(tmp_path, name, **args):
    """A model of `FACTORIES`, whose processes write their numbers to a folder."""
    module = tmp_path / "installed" / "lossy.py"
    module.write_text(textwrap.dedent(FACTORIES))
    (tmp_path / "pids").mkdir()
    args |= {"folder": str(tmp_path / "pids")}
    return {"factory": f"lossy:{name}", "args": args}


def lost(tmp_path, times):
    """A model whose worker is killed so many times."""
    return factory(tmp_path, "lost", times=times)


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


@pytest.fixture
def cluster(plain, monkeypatch, tmp_path):
    """A cluster of this machine with room for two cells; its workers see `plain`.

    What they write aside is in `tmp_path / "node"`, apart from other clusters' here.
    """
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_TMPDIR", tempfile.gettempdir())  # Sockets: a short path.
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "node"))
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_cell_whose_worker_is_killed_is_measured_again(cluster, tmp_path, capsys):
    lists = {"weight_bits": 3, "methods": ["none", "svd uniform"], "budgets": 0.3}
    path = recipe(tmp_path, lists, model=lost(tmp_path, 1), exports=["weights"])
    assert main(["compare", str(path), "--ray"]) == 0
    (killed,) = (int(each.name) for each in (tmp_path / "pids").iterdir())
    assert not alive(killed)
    # The next cell on the node removes what its worker has left there.
    assert not list((tmp_path / "node").glob("cora-cell-*"))
    found = results(tmp_path)
    assert found["failed"] == [] and found["left"] == 0
    assert [row["method"] for row in found["rows"][1:]] == ["none", "svd uniform"]
    assert all(row["kl"] > 0 and row["bytes"] > 0 for row in found["rows"][1:])
    assert "[2/2]" in capsys.readouterr().out
    # The files are here, and name the folder that they are in.
    for cell in (tmp_path / "out" / "cells").glob("*.yaml"):
        folder = cell.with_suffix("")
        assert (folder / "weights.weights").exists()
        assert str(folder) in cell.read_text() and cell.with_suffix(".log").exists()
        assert str(folder) in (folder / "recipe.yaml").read_text()
    # Without Ray there is nothing left to measure.
    assert main(["compare", str(path)]) == 0
    assert "2 of 2 cells are measured already" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_cell_that_is_lost_each_time_is_a_reason(cluster, tmp_path, capsys):
    lists = {"methods": ["none"], "ray": {"retries": 1}}
    path = recipe(tmp_path, lists, model=lost(tmp_path, 9))
    assert main(["compare", str(path), "--ray"]) == 2
    (failed,) = results(tmp_path)["failed"]
    assert "its worker on Ray was lost, and so in all 1 retries" in failed["reason"]
    assert len(list((tmp_path / "pids").iterdir())) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_leaves_neither_processes_nor_files_on_a_node(cluster, plain, tmp_path):
    from cora_plugin.grid.ray import run_on_ray

    lists = {"weight_bits": [3, 4, 5], "methods": ["none"]}
    path = recipe(tmp_path, lists, model=factory(tmp_path, "asleep"))
    document, folder = Document.read(path), Folder(tmp_path / "out")
    section = CompareSection.read(document)
    waiting = cells(document, section, {"plain": plain}, folder.cells)
    node = tmp_path / "node"

    def interrupt(running, left):
        if len(list((tmp_path / "pids").iterdir())) == 2:
            assert len(list(node.glob("cora-cell-*"))) == 2
            raise KeyboardInterrupt

    more = {"address": "", "config": section.ray}
    with folder.opened(document), pytest.raises(KeyboardInterrupt):
        run_on_ray(waiting, folder, 3, Limits(10), print, interrupt, **more)

    def left():
        yield from (each for each in (tmp_path / "pids").iterdir() if alive(each.name))
        yield from node.glob("cora-cell-*")

    began = time.monotonic()
    while found := list(left()):
        assert time.monotonic() < began + 120, found
        time.sleep(0.1)
    assert all(folder.outcome(cell) is None for cell in waiting)


@needs_ray
def test_limits_hold_there_too(cluster, tmp_path):
    path = recipe(tmp_path, {"methods": ["none"], "minutes": 1e-3})
    assert main(["compare", str(path), "--ray"]) == 2
    (failed,) = results(tmp_path)["failed"]
    assert failed["reason"].startswith("out of time after 0.001 minutes")


@needs_ray
def test_what_no_node_has_is_told(cluster, plain, tmp_path, caplog):
    from cora_plugin.grid.ray import _warn_of_waiting
    from cora_plugin.grid.schedule import Limits
    from cora_plugin.grid.section import RayConfig

    _warn_of_waiting(RayConfig(cpus=2), Limits(60))
    assert not caplog.records
    _warn_of_waiting(RayConfig(gpus=3), Limits(60, 2.0))
    assert "gpus=3 and 2 GiB for a cell" in caplog.text


@needs_ray
def test_an_address_without_a_cluster_is_one_line(plain, tmp_path, capsys):
    path = recipe(tmp_path, {"methods": ["none"]})
    assert main(["compare", str(path), "--ray", "127.0.0.1:1"]) == 2
    said = capsys.readouterr().err.strip()
    assert "no cluster at '127.0.0.1:1'" in said and "\n" not in said


def test_without_ray_the_line_says_how_to_install_it(
    plain, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    path = recipe(tmp_path, {"methods": ["none"]})
    assert main(["compare", str(path), "--ray"]) == 2
    said = capsys.readouterr().err.strip()
    assert "pip install ray" in said and "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ray", "message"),
    [
        ({"cpus": 0}, "compare.ray.cpus: 0 is out of range"),
        ({"retries": -1}, "compare.ray.retries: -1 is out of range"),
        ({"cpu": 1}, "compare.ray: unknown key 'cpu'; did you mean cpus?"),
    ],
)
def test_what_a_cell_takes_is_checked(plain, tmp_path, capsys, ray, message):
    path = recipe(tmp_path, {"methods": ["none"], "ray": ray})
    with pytest.raises(CoRaError) as raised:
        compare(path)
    assert message in str(raised.value)
