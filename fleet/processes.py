"""What the system says about running processes: who descends from whom, CPU time, resident memory.

Laws of the file: Linux only (`/proc`), read and never written but for `forget_peak`; a process that ends between two
reads is not an error. Source: proc_pid_stat(5), proc_pid_status(5).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
_PARENT, _USER, _SYSTEM, _CHILDREN_SYSTEM = 1, 11, 12, 14  # fields of `stat` behind the name
MIB = 2**20


def family(roots: Iterable[int]) -> list[int]:
    """The processes and all that descend from them, as far as they are alive or not yet waited for."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for entry in os.listdir(_PROC):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children[int(fields[_PARENT])].append(int(entry))
    found = list(roots)
    for process_id in found:  # grows while it is walked
        found += children[process_id]
    return found


def children(process_id: int) -> list[int]:
    """The direct children of a process."""
    numbers = (int(entry) for entry in os.listdir(_PROC) if entry.isdigit())
    return [number for number in numbers if (fields := _stat(number)) and int(fields[_PARENT]) == process_id]


def cpu_seconds(roots: Iterable[int]) -> float:
    """CPU time, user and system, that the families of the processes have used, ended children included."""
    ticks = 0
    for process_id in family(roots):
        if fields := _stat(process_id):
            ticks += sum(int(value) for value in fields[_USER : _CHILDREN_SYSTEM + 1])
    return ticks / _TICKS_PER_SECOND


def own_cpu_seconds(process_id: int) -> float:
    """CPU time, user and system, of one process without its children; 0 when it has ended."""
    fields = _stat(process_id)
    return sum(int(value) for value in fields[_USER : _SYSTEM + 1]) / _TICKS_PER_SECOND


def resident_mib(process_id: int) -> float:
    """RSS of one process, MiB; 0 when it has ended."""
    return _status_mib(process_id, "VmRSS:")


def peak_mib(process_id: int) -> float:
    """The largest RSS of one process since it started or since `forget_peak`, MiB; 0 when it has ended."""
    return _status_mib(process_id, "VmHWM:")


def proportional_mib(process_id: int) -> float:
    """PSS of one process, MiB: a page that n processes share counts 1/n. 0 when it has ended."""
    return _mib_of(_PROC / str(process_id) / "smaps_rollup", "Pss:")


def forget_peak(process_id: int) -> None:
    """Sets the peak of a process of ours back to what it holds now (`clear_refs`, proc_pid_clear_refs(5))."""
    (_PROC / str(process_id) / "clear_refs").write_text("5", encoding="ascii")


def machine_cpu_seconds() -> float:
    """CPU time that this machine has spent on anything since its start, proc_stat(5)."""
    user, nice, system, _idle, _wait, irq, soft_irq = (
        int(value) for value in (_PROC / "stat").read_text(encoding="ascii").split("\n")[0].split()[1:8]
    )
    return (user + nice + system + irq + soft_irq) / _TICKS_PER_SECOND


def loopback_bytes() -> int:
    """Bytes that went through the loopback interface of this network namespace, each counted once."""
    for line in (_PROC / "self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[0])
    return 0


def end_family(process: subprocess.Popen[bytes], *, patience_seconds: float = 5.0) -> None:
    """Ends a process and all that descends from it: asks first, then kills what is left."""
    members = family([process.pid])
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Those that came since, too: a supervisor may have started another child before it was asked.
        members += [member for member in family([process.pid]) if member not in members]
        for member in reversed(members):
            _signal(member, number)
        until = time.monotonic() + patience_seconds
        while process.poll() is None or any(_is_running(member) for member in members):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
    process.wait()


def _signal(process_id: int, number: signal.Signals) -> None:
    if _is_running(process_id):
        try:
            os.kill(process_id, number)
        except ProcessLookupError:
            return


def _is_running(process_id: int) -> bool:
    fields = _stat(process_id)
    return bool(fields) and fields[0] != "Z"


def _stat(process_id: int) -> list[str]:
    """The fields behind the name, which may hold blanks and brackets; empty when the process has ended."""
    try:
        text = (_PROC / str(process_id) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _status_mib(process_id: int, name: str) -> float:
    return _mib_of(_PROC / str(process_id) / "status", name)


def _mib_of(file: Path, name: str) -> float:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0.0
    for line in lines:
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / MIB
    return 0.0
