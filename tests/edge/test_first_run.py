"""The enrolment of a first run happens in a child; what becomes of the child becomes of the run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_agent.enrolment import first_run
from edge_agent.enrolment.first_run import enrol_in_child
from wire.errors import EnrolmentError


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of the interpreter; a test writes it."""
    path = tmp_path / "program"
    path.touch(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def test_child_gets_the_token_by_standard_input_alone(program: Path, tmp_path: Path) -> None:
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\ncat > {tmp_path}/told\nexit 4\n')
    assert enrol_in_child("shoal1.secret", Path("/some/state")) == 4
    assert (tmp_path / "arguments").read_text() == "-m edge_agent.enrolment.first_run /some/state\n"
    assert (tmp_path / "told").read_text() == "shoal1.secret\n"


def test_child_that_is_killed_or_hangs_is_an_error_with_a_hint(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(EnrolmentError, match="signal 9") as caught:
        enrol_in_child("token", Path("state"))
    assert caught.value.hint
    monkeypatch.setattr(first_run, "TIMEOUT_SECONDS", 0.05)
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    with pytest.raises(EnrolmentError, match="too long"):
        enrol_in_child("token", Path("state"))


def test_token_that_is_no_text_is_refused_in_the_child(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert enrol_in_child("shoal1.\udcff", tmp_path / "state") == 5
    talk = capfd.readouterr().err
    assert "enrolment token is damaged" in talk
    assert "hint: " in talk
    assert not (tmp_path / "state").exists()
