"""Child processes of the agent: bounded in time and output, without our secrets, and gone when the agent
goes.

Laws of the file: a child gets a short list of environment variables and nothing else of ours; what it prints
is read up to a limit; none is left behind by `end_children`; a child gives way to us.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from edge_agent.background import lower_priority
from wire.errors import ShoalError

MAX_OUTPUT_BYTES: Final = 2**20
# PYTHONOPTIMIZE names the bytecode files: without it a child in the image would compile all that it imports.
_PASSED_ON: Final = (
    "PATH",
    "LD_LIBRARY_PATH",
    "HOME",
    "LANG",
    "TMPDIR",
    "OMP_NUM_THREADS",
    "PYTHONOPTIMIZE",
)

_lock = threading.Lock()
_running: set[subprocess.Popen[bytes]] = set()


class ChildTimeoutError(ShoalError):
    """A child did not end in time, and was ended."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: its exit code (below 0: the signal that killed it) and the start of its output."""

    code: int
    output: bytes


def run_child(
    module: str,
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    stdin: bytes = b"",
    talks: bool = False,
) -> Ended:
    """Runs `python -m module arguments` to its end.

    Args:
        talks: what it says on standard error is shown where ours is; else it is dropped.

    Raises:
        ChildTimeoutError: it took longer than `timeout_seconds`.
    """
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["ORT_DISABLE_TELEMETRY"] = "1"
    command = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE
    talk = None if talks else subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=talk, env=environment) as process:
        lower_priority(process.pid)
        with _lock:
            _running.add(process)
        try:
            output, _ = process.communicate(stdin, timeout=timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise ChildTimeoutError(f"{module} did not end in {timeout_seconds:g} seconds") from error
        finally:
            process.kill()
            with _lock:
                _running.discard(process)
    return Ended(process.returncode, output[:MAX_OUTPUT_BYTES])


def end_children() -> None:
    """Ends every child that still runs; what waited for one sees it killed."""
    with _lock:
        for process in _running:
            process.kill()
