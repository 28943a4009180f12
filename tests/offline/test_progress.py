"""Progress: one changing line on a terminal, few lines elsewhere."""

import sys

import pytest

from offline import progress
from offline.progress import Progress, course


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_progress_prints_rate_and_time_left_now_and_then(clock, capsys):
    with Progress("measure", 10_000_000) as bar:
        for clock[0] in (1.0, 6.0, 7.0, 8.0):
            bar.advance(2_500_000)
    assert capsys.readouterr().err.splitlines() == [
        "measure:  50% of 10.0 MB, 833.3 KB/s, 6 s left",
        "measure: 100% of 10.0 MB, 1.2 MB/s, 0 s left",
    ]


def test_progress_does_not_count_what_was_done_before_for_the_rate(clock, capsys):
    with Progress("write", 10_000_000, 8_000_000) as bar:
        clock[0] = 10.0
        bar.advance(1_000_000)
    assert capsys.readouterr().err == "write:  90% of 10.0 MB, 100.0 KB/s, 10 s left\n"


def test_progress_changes_one_line_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("write", 4_000_000_000) as bar:
        for clock[0] in (0.1, 0.3, 0.4, 1.0):
            bar.advance(1_000_000)
    first, second = "6.7 MB/s, 10 min 0 s left", "4.0 MB/s, 16 min 39 s left"
    expected = "".join(f"\rwrite:   0% of 4.0 GB, {rest}\x1b[K" for rest in (first, second))
    assert capsys.readouterr().err == f"{expected}\n"


def test_progress_ends_its_line_before_an_error(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(KeyError), Progress("write", 2) as bar:
        clock[0] = 1.0
        bar.advance(1)
        raise KeyError
    assert capsys.readouterr().err.endswith("left\x1b[K\n")


def test_progress_tells_the_time_left_of_the_whole_job(clock, capsys):
    with course() as job:
        job.expected = {"measure": 60.0, "text": 130.0, "gptq": 3600.0}
        with Progress("measure", 10_000_000) as bar:
            clock[0] = 10.0
            bar.advance(5_000_000)
        for clock[0] in (10.0, 30.0):
            with Progress("text", 1_000_000) as bar:
                clock[0] += 10.0
                bar.advance(1_000_000)
        with Progress("other", 1_000_000) as bar:
            bar.advance(1_000_000)
    assert job.spent == {"measure": 10.0, "text": 20.0, "other": 0.0}
    left = [line.split("; ")[1:] for line in capsys.readouterr().err.splitlines()]
    # Half of measure was done in 10 s of its 60; each part of text takes 10 s of its 130.
    assert left == [
        ["1 h 3 min of the whole job"],
        ["1 h 2 min of the whole job"],
        ["1 h 1 min of the whole job"],
        [],
    ]
