"""Struck at every single system call: `kill -9`, a full disk and a broken disk at the first, second, third … of each.

Laws of the file: the points are counted in a play that is traced and not struck, so none is left out that changes
something (reads change nothing: a kill there is one at the call before); a point counts when strace says that it was
hit; a play is whole or none. Source: strace(1), "Tampering"; Yang et al., "EXPLODE" (OSDI 2006) for the idea.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from fleet.real_chaos.cloud_path import CloudPath
from fleet.real_chaos.device_path import DevicePath
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.paths import Findings, workshop
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.victim import Nursery, Strike
from models.bundle import Bundle

CHANGING: Final = (
    "openat",
    "write",
    "pwrite64",
    "writev",
    "fsync",
    "fdatasync",
    "ftruncate",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "unlink",
    "unlinkat",
    "mkdir",
    "mkdirat",
    "rmdir",
    "chmod",
    "fchmod",
    "sendto",
)
"""What a kill can fall between."""
FULL: Final = ("write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate", "mkdir", "rename", "linkat")
"""What a full disk refuses."""
BROKEN: Final = (*FULL, "openat", "read", "pread64", "unlink")
"""What a broken disk refuses."""
_CALL = re.compile(r"^\d+ +(?P<call>\w+)\((?P<arguments>.*)")
_INJECTED: Final = "(INJECTED)"
_ACTS: Final = {"KILL": CHANGING, "ENOSPC": FULL, "EIO": BROKEN}
_SEARCHED: Final = ("openat", "read")
"""Calls that Python makes for files of its own, too; only those on the node's folder are struck."""


class CriticalPath(Protocol):
    """What can be struck."""

    role: str

    def play(self, **options: Any) -> Findings:
        """One play."""
        ...


@dataclass
class Result:
    """What came of so many points."""

    struck: Counter[str] = field(default_factory=Counter)
    idle: int = 0
    findings: Findings = field(default_factory=Findings)

    def add(self, path: str, strike: Strike, is_struck: bool, found: Findings) -> None:
        """One more play."""
        if is_struck:
            self.struck[f"{path} {strike.act} {strike.call}"] += 1
        else:
            self.idle += 1
        self.findings.add(found, f"{path}, {strike}")


def points(path: CriticalPath, folder: Path, acts: Iterable[str] = tuple(_ACTS)) -> list[Strike]:
    """Every point of a path, from one play that is traced.

    Args:
        folder: for what strace writes.
        acts: keys of what can befall it; `ENOSPC` is a disk that is full from there on, too.
    """
    trace = folder / f"{path.role}.trace"
    calls = sorted({call for each in _ACTS.values() for call in each})
    path.play(trace=trace, calls=",".join(calls))
    found = []
    for call, number, is_ours in _counted(trace.read_text(errors="replace").splitlines(), f"/{path.role}/"):
        for act in acts:
            if call not in _ACTS[act] or not is_ours:
                continue
            found.append(Strike(call, number, act))
            if act == "ENOSPC":
                found.append(Strike(call, number, act, is_lasting=True))
    return found


def _counted(lines: Iterable[str], folder: str) -> Iterator[tuple[str, int, bool]]:
    """Each call, its number among its like in its thread, and whether it is about the node's own files."""
    counts: Counter[tuple[str, str]] = Counter()
    seen: set[tuple[str, int]] = set()
    for line in lines:
        matched = _CALL.match(line)
        if matched is None:
            continue
        call, arguments = matched["call"], matched["arguments"]
        thread = line.partition(" ")[0]
        counts[thread, call] += 1
        number = counts[thread, call]
        if (call, number) in seen:
            continue  # strace counts in each thread; the first that comes so far is the one
        seen.add((call, number))
        is_ours = call not in _SEARCHED or (
            folder in arguments and (call != "openat" or "O_RDONLY" not in arguments)
        )
        yield call, number, is_ours


def strike_all(
    path: CriticalPath, strikes: Sequence[Strike], folder: Path, result: Result | None = None
) -> Result:
    """Plays the path once for each strike.

    Args:
        result: where to add what came of them.
    """
    result, trace = result or Result(), folder / f"{path.role}.trace"
    for strike in strikes:
        found = path.play(trace=trace, calls=strike.call, strike=strike)
        text = trace.read_text(errors="replace")
        is_struck = "+++ killed by SIGKILL +++" in text if strike.act == "KILL" else _INJECTED in text
        result.add(path.role, strike, is_struck, found)
    return result


@contextmanager
def paths_of(
    bundle: Bundle | None, roles: Sequence[str] = ("device", "cloud")
) -> Iterator[tuple[list[CriticalPath], Path]]:
    """The paths of these roles, ready to be played, and a folder for traces."""
    with ExitStack() as stack:
        nurseries = {role: stack.enter_context(Nursery(role)) for role in roles}
        bench = stack.enter_context(workshop(bundle))
        paths: list[CriticalPath] = []
        for role, nursery in nurseries.items():
            paths.append(DevicePath(bench, nursery) if role == "device" else CloudPath(bench, nursery))
        yield paths, bench.root


def _play(task: Task) -> Outcome:
    """A slice of all points: that of the task's seed, so that plays with the seeds that follow reach every one."""
    started = time.monotonic()
    result = Result()
    with paths_of(task.bundle) as (paths, folder):
        all_points = [(path, strike) for path in paths for strike in points(path, folder)]
        first = task.seed * task.faults % len(all_points)
        chosen = (all_points * 2)[first : first + min(task.faults, len(all_points))]
        for number, (path, strike) in enumerate(chosen, start=1):
            if task.is_over:
                break
            strike_all(path, [strike], folder, result)
            task.tell(number)
    return task.outcome("syscalls", result.findings.books(), result.struck, started, idle=result.idle)


SCENARIOS = (
    Scenario(
        "syscalls",
        "an agent's and an aggregator's critical path, killed or refused at each single system call",
        _play,
        needs=("strace",),
    ),
)
