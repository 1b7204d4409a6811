"""What the system says about processes: families across sessions, CPU of ended children, peaks, and a clean end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fleet import processes

# A parent whose child lives in a session of its own, as Flower's supervisors do.
_PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
_BUSY = """
import subprocess, sys
burn = "import time\\nwhile time.process_time() < 0.3: pass"
subprocess.run([sys.executable, "-c", burn], check=True)
print("done", flush=True)
sys.stdin.read()
"""
_GROWING = """
import sys
block = b"x" * (48 * 2**20)
del block
print("freed", flush=True)
sys.stdin.readline()
print("reset", flush=True)
sys.stdin.readline()
"""


@contextmanager
def running(code: str) -> Iterator[subprocess.Popen[bytes]]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_family_has_children_in_other_sessions() -> None:
    with running(_PARENT) as parent:
        child = int(line_of(parent))
        assert processes.family([parent.pid]) == [parent.pid, child]
        assert parent.pid in processes.children(os.getpid())
        processes.end_family(parent)


def test_end_family_ends_children_in_other_sessions() -> None:
    with running(_PARENT) as parent:
        child = int(line_of(parent))
        processes.end_family(parent)
        assert parent.returncode is not None
        assert processes.resident_mib(child) == 0.0


def test_cpu_seconds_count_children_that_have_ended() -> None:
    with running(_BUSY) as process:
        assert line_of(process) == b"done"
        assert processes.cpu_seconds([process.pid]) >= 0.3


def test_forget_peak_sets_the_peak_back_to_what_is_held() -> None:
    with running(_GROWING) as process:
        assert line_of(process) == b"freed"
        assert processes.peak_mib(process.pid) >= 48.0 + processes.resident_mib(process.pid) / 2
        processes.forget_peak(process.pid)
        assert processes.peak_mib(process.pid) < 48.0
        assert processes.proportional_mib(process.pid) <= processes.peak_mib(process.pid)


def test_process_that_has_ended_reads_as_nothing() -> None:
    with running("pass") as process:
        process.wait()
        assert processes.resident_mib(process.pid) == 0.0
        assert processes.cpu_seconds([process.pid]) == 0.0
