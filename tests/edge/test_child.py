"""Children of the agent: what they are given, what is read of them, and that none stays behind."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from edge_agent import child
from edge_agent.background import NICENESS
from edge_agent.child import ChildTimeoutError, end_children, run_child


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of the interpreter; a test writes it."""
    path = tmp_path / "program"
    path.touch(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def test_child_gets_no_secrets_of_ours(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ENROLL_TOKEN", "a secret")
    monkeypatch.setenv("ANYTHING_ELSE", "a secret")
    program.write_text("#!/bin/sh\nenv\n")
    ended = run_child("some.module", [], timeout_seconds=20)
    assert ended.code == 0
    assert b"secret" not in ended.output
    assert b"ORT_DISABLE_TELEMETRY=1" in ended.output


def test_child_gets_its_arguments_and_its_input(program: Path) -> None:
    program.write_text('#!/bin/sh\necho "$@"\ncat\nexit 3\n')
    ended = run_child("some.module", ["a", "b c"], timeout_seconds=20, stdin=b"told")
    assert (ended.code, ended.output) == (3, b"-m some.module a b c\ntold")


def test_child_gives_way_to_us(program: Path) -> None:
    program.write_text("#!/bin/sh\ncat; nice\n")  # the end of its input comes when its priority is set
    told = int(run_child("some.module", [], timeout_seconds=20).output)
    assert told == min(19, max(os.getpriority(os.PRIO_PROCESS, 0), NICENESS))


@pytest.mark.parametrize("talks", [True, False])
def test_child_is_heard_on_standard_error_only_where_it_talks(
    program: Path, capfd: pytest.CaptureFixture[str], talks: bool
) -> None:
    program.write_text("#!/bin/sh\necho said; echo a word >&2\n")
    assert run_child("some.module", [], timeout_seconds=20, talks=talks).output == b"said\n"
    assert capfd.readouterr() == ("", "a word\n" if talks else "")


def test_output_is_read_up_to_its_limit(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "MAX_OUTPUT_BYTES", 100)
    program.write_text("#!/bin/sh\nhead -c 5000 /dev/zero\n")
    assert run_child("some.module", [], timeout_seconds=20).output == bytes(100)


def test_child_that_takes_too_long_is_ended(program: Path) -> None:
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    with pytest.raises(ChildTimeoutError, match="did not end in"):
        run_child("some.module", [], timeout_seconds=0.05)
    assert not child._running


def test_children_end_with_the_agent(program: Path) -> None:
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(run_child("some.module", [], timeout_seconds=600).code)
    )
    thread.start()
    while thread.is_alive():
        end_children()
        thread.join(timeout=0.01)
    assert codes == [-9]
