"""From errors to exit codes, in process and as a real command in a pipe."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from process.exits import EXIT_CODES, run_cli
from wire import errors
from wire.errors import ConfigurationError, QuorumError, ShoalError


def raising(error: BaseException) -> int:
    def main() -> int:
        raise error

    return run_cli(main)


def test_done_is_zero_and_a_number_passes_through() -> None:
    assert run_cli(lambda: None) == 0
    assert run_cli(lambda: 3) == 3


def test_error_is_two_lines_on_stderr_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigurationError("no such dataset 'x'", hint="fashion-mnist or\nsmartwatch \x1b[31m")
    assert raising(error) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: no such dataset 'x'\nhint: fashion-mnist or smartwatch  [31m\n"
    assert raising(QuorumError("too few", present=1, needed=2)) == 7
    too_few = capsys.readouterr().err.splitlines()
    assert too_few[0] == "error: too few"
    assert too_few[1].startswith("hint: ")


def test_every_error_has_a_documented_code() -> None:
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, ShoalError):
            assert error.exit_code in EXIT_CODES


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_fault_in_the_program_shows_a_trace_and_is_70(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(ValueError("oops")) == 70
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert "error: a fault in this program: ValueError: oops" in captured


def absent(name: str) -> int:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_package_of_an_absent_extra_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(lambda: absent("sqlalchemy.orm"), extra="cloud") == 2
    assert capsys.readouterr().err == "error: sqlalchemy is not installed\nhint: pip install 'shoal[cloud]'\n"


@pytest.mark.parametrize(("name", "extra"), [("sqlalchemy", ""), ("wire.nothing", "cloud")])
def test_module_that_no_extra_brings_is_a_fault(
    name: str, extra: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(lambda: absent(name), extra=extra) == 70
    assert "Traceback" in capsys.readouterr().err


def test_exit_of_the_argument_parser_passes_through() -> None:
    with pytest.raises(SystemExit):
        raising(SystemExit(2))


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), 8, "/x/y: Permission denied"),
        (OSError(28, "No space left on device"), 8, "No space left on device"),
        (ConnectionResetError(104, "Connection reset by peer"), 4, "Connection reset by peer"),
        (MemoryError(), 1, "not enough memory"),
    ],
)
def test_what_the_machine_refuses_is_an_error_and_no_fault(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error) == code
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[0]
    assert [line.partition(": ")[0] for line in lines] == ["error", "hint"]


PRINTING = "import sys; from process.exits import run_cli\nsys.exit(run_cli(lambda: print('x')))"


def test_full_disk_behind_standard_output_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINTING], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 8
    assert "No space left on device" in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 2


def test_letter_that_the_terminal_lacks_ends_no_command() -> None:
    program = "import sys; from process.exits import run_cli\nsys.exit(run_cli(lambda: print('h\\u00e9')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "h\\xe9\n", "")


def test_closed_streams_are_never_the_next_open_file(tmp_path: Path) -> None:
    program = (
        "import sys; from process.exits import run_cli\n"
        "def main():\n"
        f"    with open({str(tmp_path / 'data')!r}, 'w') as file:\n"
        "        print('talk'); print('talk', file=sys.stderr); file.write('data')\n"
        "sys.exit(run_cli(main))"
    )
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", shell], check=False).returncode == 0
    assert (tmp_path / "data").read_text() == "data"


def test_help_that_nobody_reads_is_silent() -> None:
    program = "import sys; from fleet.cli import main\nsys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 141)  # argparse itself forgives a pipe that breaks while it writes


def test_reader_that_goes_away_is_141_and_silent() -> None:
    program = (
        "import sys; from process.exits import run_cli\n"
        "def main():\n    for _ in range(100000): print('x' * 100)\n"
        "sys.exit(run_cli(main))"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    complaint = child.stderr.read()
    assert child.wait() == 141
    assert complaint == b""
    child.stderr.close()
