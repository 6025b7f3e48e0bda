"""Progress of long loops: behind the spinner, in a terminal, and none in a pipe."""

import io
import itertools
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from cora_plugin import progress
from cora_plugin.progress import bar, counter, quiet, timed


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Two seconds from one look at the clock to the next, however busy the machine."""
    looks = itertools.count(step=2)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=looks.__next__))


def work():
    for _ in bar(range(4), "gradients", "batch"):
        time.sleep(0.12)  # More than tqdm waits between two lines.
    return 1


def test_a_terminal_sees_how_far_it_is_and_what_is_left():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    timed(console, "adapters", work)
    shown = stream.getvalue()
    assert "adapters: gradients 2/4, about 00:00 left" in shown
    assert "adapters: 2 s" in shown


def test_figures_of_an_iteration_are_shown():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with quiet(console, "adapters"), counter("butterworth", "iteration", 2) as progress:
        progress.update()
        progress.set_postfix({"loss": "0.5"})
        time.sleep(0.2)  # The spinner draws ten times a second.
    assert "adapters: butterworth 1/2" in stream.getvalue()
    assert "loss=0.5" in stream.getvalue()


def test_a_pipe_gets_one_line_a_stage(capsys):
    stream = io.StringIO()
    timed(Console(file=stream), "adapters", work)
    assert stream.getvalue() == "adapters: 2 s\n"
    work()  # And none where nobody asked.
    assert capsys.readouterr() == ("", "")


def test_what_is_quiet_shows_nothing():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, quiet=True)
    timed(console, "adapters", work)
    assert stream.getvalue() == ""
