"""From an error to an exit code and two lines on stderr: the outermost frame of every command.

Codes: 0 done; 1 an error of ours without a branch of its own; 2 configuration or command line; 3 what a peer
sent; 4 network or broker; 5 signatures, certificates, tokens; 6 a model or its data; 7 a round; 8 disk; 70 a
fault in this program; 130 interrupted; 141 the reader of our output went away. Law: an error is two lines,
`error: …` and `hint: …`, never a traceback; only a fault in the program shows one.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from wire.errors import MissingExtraError, ShoalError

EXIT_FAULT = 70
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "an error that belongs to no other code",
    2: "the command line, a setting, a file or an argument is wrong",
    3: "what the other side sent cannot be used",
    4: "the network or the broker failed, or the broker cannot be started",
    5: "a signature, certificate, token or release metadata does not verify",
    6: "a model, its graphs, shapes or data cannot be used",
    7: "a federated round cannot start or cannot end well",
    8: "the disk is full, damaged, or holds something that is not ours",
    EXIT_FAULT: "a fault in this program",
    EXIT_INTERRUPTED: "interrupted (Ctrl-C)",
    EXIT_BROKEN_PIPE: "the reader of standard output went away",
}


_OURS = {"wire", "process", "edge_agent", "models", "cloud_server", "fleet"}


def run_cli(main: Callable[[], int | None], *, extra: str = "") -> int:
    """Runs a command and returns its exit code; None from `main` is 0.

    `SystemExit`, which argparse raises after it has printed its own message, passes through.

    Args:
        extra: of the distribution, that brings what the command imports beyond the base install.
    """
    try:
        code = main()
        sys.stdout.flush()  # a reader that went away shows here, not in the interpreter's shutdown
    except ShoalError as error:
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        _say("error: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 — the outermost frame of the process
        missing = _missing_extra(error, extra)
        if missing is not None:
            print_error(missing)
            return missing.exit_code
        _say(traceback.format_exc().rstrip())
        _say(f"error: a fault in this program: {type(error).__name__}: {error}")
        _say("hint: please report it with the lines above")
        return EXIT_FAULT
    return code or 0


def print_error(error: ShoalError) -> None:
    """`error: …` and, where there is one, `hint: …`, each on one line of stderr."""
    _say(f"error: {_one_line(str(error))}")
    if error.hint:
        _say(f"hint: {_one_line(error.hint)}")


def _missing_extra(error: Exception, extra: str) -> MissingExtraError | None:
    """What to say when a package of an extra is not there; None for any other fault."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not extra or not package or package in _OURS:
        return None
    return MissingExtraError(
        f"{package} is not installed", hint=f"pip install 'shoal[{extra}]'", package=package
    )


def _discard_stdout() -> None:
    """What is left in the buffer has no reader; without this the interpreter complains at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    finally:
        os.close(nowhere)


def _one_line(text: str) -> str:
    """Control characters out: the text may quote a peer or a file."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        return
