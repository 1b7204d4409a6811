"""Freed memory leaves the process where the C library is glibc, and nothing happens where it is not."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent import freed_memory

ROOT = Path(__file__).resolve().parents[2]
# Every second block of what a thread allocated stays: without a trim, the holes between them stay resident too.
PROGRAM = """
import resource
import threading
from edge_agent.freed_memory import give_back, share_one_arena

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

assert share_one_arena()
kept = []

def fill():
    blocks = [bytes(65_536) for _ in range(800)]
    kept.extend(blocks[::2])

thread = threading.Thread(target=fill)
thread.start()
thread.join()
before = resident()
assert give_back()
print(before - resident())
"""


# Faults of pages while ten buffers of 8 MiB are made and let go, with and without keeping them.
BUFFERS = """
import resource
from edge_agent.freed_memory import give_back, keep_large_buffers, share_one_arena

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(8 * 2**20)[::4096]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert share_one_arena() and give_back()
plain = faults()
assert keep_large_buffers()
faults()
kept = faults()
assert give_back()
print(plain, kept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_buffers_are_kept_until_memory_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUFFERS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    plain, kept, after = map(int, done.stdout.split())
    assert kept * 20 < min(plain, after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 15 * 2**20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """Has neither function."""

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Other())
    assert not freed_memory.give_back()
    assert not freed_memory.share_one_arena()
    assert not freed_memory.keep_large_buffers()
