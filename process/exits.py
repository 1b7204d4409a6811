"""From an error to an exit code and two lines on stderr: the outermost frame of every command.

Codes: 0 done; 1 an error of ours without a branch of its own; 2 configuration or command line; 3 what a peer
sent; 4 network or broker; 5 signatures, certificates, tokens; 6 a model or its data; 7 a round; 8 disk; 70 a
fault in this program; 130 interrupted; 141 the reader of our output went away. Law: an error is two lines,
`error: …` and `hint: …`, never a traceback; only a fault in the program shows one.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable

from wire.errors import MissingExtraError, ShoalError, StorageError, TransportError

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


# For an error that brings none of its own: where one would look first.
_HINTS = {
    1: "the lines before this one say what was going on",
    2: "`--help` shows what the command takes, docs/reference.md every setting",
    3: "see the log of the other side: both should run the same version of Shoal",
    4: "check that the other side runs, and that its address and port are open from here",
    5: "nothing of it was used; ask whoever runs the aggregator",
    6: "docs/how-to/your-own-model.md says what a model and its data look like",
    7: "`shoal-cloud status` and `shoal-cloud device list` show who is there",
    8: "check the disk's free space, and the owner and rights of the folder",
}

_OURS = {"wire", "process", "edge_agent", "models", "cloud_server", "fleet"}


def run_cli(main: Callable[[], int | None], *, extra: str = "") -> int:
    """Runs a command and returns its exit code; None from `main` is 0.

    `SystemExit`, with which argparse ends `--help`, passes through.

    Args:
        extra: of the distribution, that brings what the command imports beyond the base install.
    """
    _open_closed_streams()
    _allow_any_text()
    try:
        code = _outcome(main, extra)
    except SystemExit:
        if _flush_stdout() == EXIT_BROKEN_PIPE:
            return EXIT_BROKEN_PIPE
        raise
    return code or _flush_stdout()


def _outcome(main: Callable[[], int | None], extra: str) -> int:
    try:
        return main() or 0
    except KeyboardInterrupt:
        _say("error: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except Exception as error:  # noqa: BLE001 — the outermost frame of the process
        known = _as_ours(error, extra)
        if known is not None:
            _flush_stdout()
            print_error(known)
            return known.exit_code
        _say(traceback.format_exc().rstrip())
        _say(f"error: a fault in this program: {type(error).__name__}: {error}")
        _say("hint: please report it with the lines above")
        return EXIT_FAULT


def _flush_stdout() -> int:
    """A reader that went away, or a full disk, shows here and not in the interpreter's shutdown."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except OSError as error:
        _discard_stdout()
        refused = _machine_error(error, "standard output: ")
        print_error(refused)
        return refused.exit_code
    return 0


def print_error(error: ShoalError) -> None:
    """`error: …` and `hint: …`, each on one line of stderr."""
    _say(f"error: {_one_line(str(error))}")
    _say(f"hint: {_one_line(error.hint or _HINTS[error.exit_code])}")


def _as_ours(error: Exception, extra: str) -> ShoalError | None:
    """An error of ours, or what the machine refused as one; None for a fault of the program."""
    if isinstance(error, ShoalError):
        return error
    if isinstance(error, MemoryError):
        return ShoalError("there is not enough memory", hint="free some, or give the command less to do")
    if isinstance(error, OSError):
        return _machine_error(error)
    return _missing_extra(error, extra)


def _machine_error(error: OSError, where: str = "") -> ShoalError:
    """What no part of ours foresaw: a full output, a folder that went away in the middle."""
    if not where and error.filename is not None:
        where = f"{error.filename}: "
    text = f"{where}{error.strerror or error}"
    # socket.gaierror and ssl.SSLError by their homes: neither module is worth loading for this.
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__ in ("socket", "ssl"):
        return TransportError(text)
    return StorageError(text, hint="free space on the disk" if error.errno == errno.ENOSPC else "")


def _open_closed_streams() -> None:
    """A standard stream that was closed (`>&-`) gets /dev/null.

    Otherwise the next file that is opened takes its number, and what is printed goes into that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, mode, closefd=False, encoding="utf-8"))


def _allow_any_text() -> None:
    """A terminal that cannot show a letter gets its number: what a peer is called must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
    try:
        number = sys.stdout.fileno()
    except OSError:
        return  # it has no file behind it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, number)
    finally:
        os.close(nowhere)


def _one_line(text: str) -> str:
    """Control characters out: the text may quote a peer or a file."""
    return "".join(character if character.isprintable() else " " for character in text).strip()


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return  # nobody is left who could read it
