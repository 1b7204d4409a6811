"""The progress line: drawn on a terminal, silent in a pipe."""

from __future__ import annotations

import io

import pytest

from process.progress import Progress, aside


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return [part.rstrip("\n") for part in self.getvalue().split("\r\x1b[2K") if part]


class Ticks:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_bar_shows_count_share_time_left_and_note() -> None:
    stream, ticks = Terminal(), Ticks()
    with Progress("rounds", 4, stream=stream, monotonic=ticks) as bar:
        ticks.seconds = 10.0
        bar.advance(note="accuracy .81")
        ticks.seconds = 75.0
        bar.advance(3)
    assert stream.lines() == [
        "rounds  [........................]  0/4",
        "rounds  [######..................]  1/4  0:30 left  accuracy .81",
        "rounds  [########################]  4/4  1:15  accuracy .81",
        "rounds  [########################]  4/4  1:15  accuracy .81",
    ]
    assert stream.getvalue().endswith("\n")


def test_total_that_nobody_knows_is_a_count() -> None:
    stream, ticks = Terminal(), Ticks()
    with Progress("bytes", stream=stream, monotonic=ticks) as bar:
        bar.advance(5)
        ticks.seconds = 3_700.0
        bar.advance(5)
    assert stream.lines()[-1] == "bytes  10  1:01:40"


def test_pipe_and_dumb_terminal_stay_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, dumb = io.StringIO(), Terminal()
    with Progress("rounds", 2, stream=pipe) as bar:
        bar.advance()
    monkeypatch.setenv("TERM", "dumb")
    with Progress("rounds", 2, stream=dumb) as bar:
        bar.advance()
    assert pipe.getvalue() == dumb.getvalue() == ""
    assert bar.done == 1


def test_line_is_not_drawn_more_than_ten_times_a_second() -> None:
    stream, ticks = Terminal(), Ticks()
    with Progress("steps", 10_000, stream=stream, monotonic=ticks) as bar:
        for _ in range(10_000):
            ticks.seconds += 0.0001
            bar.advance()
    assert 8 <= len(stream.lines()) <= 13


def test_line_is_cut_to_the_width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    with Progress("rounds", 4, stream=stream) as bar:
        bar.advance(note="x" * 100)
    assert max(len(line) for line in stream.lines()) == 29


def test_other_lines_are_written_above_the_bar() -> None:
    stream, pipe = Terminal(), io.StringIO()
    with Progress("rounds", 4, stream=stream):
        with aside(stream):
            stream.write("a line\n")
        with aside(pipe):
            pipe.write("x\n")
    assert "\r\x1b[2Ka line\n\r\x1b[2Krounds" in stream.getvalue()
    with aside(stream):
        stream.write("after\n")
    assert stream.getvalue().endswith("\nafter\n")
    assert pipe.getvalue() == "x\n"
