"""A line of progress: percent, speed and time left, with and without a terminal."""

import sys

import pytest

from training.data.progress import Progress, track


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_passes_items_on(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(track(iter("abcdefgh"), 8, "working", show=False)) == list("abcdefgh")
    assert capsys.readouterr().err == ""
    assert list(track(iter("abcdefgh"), 8, "working")) == list("abcdefgh")
    printed = capsys.readouterr().err
    assert "100%" in printed
    if not terminal:
        assert printed.splitlines() == [f"working: {percent}%" for percent in (25, 50, 75, 100)]


def test_progress_tells_speed_and_time_left(capsys):
    now = [0.0]
    with Progress("reading", 2**22, clock=lambda: now[0]) as progress:
        for second in range(1, 9):
            now[0] = float(second)
            progress.advance(2**19)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "reading: 62% of 4.0 MiB, 0.5 MiB/s, eta 0:03"
    assert told[-1] == "reading: 100% of 4.0 MiB, 0.5 MiB/s"
