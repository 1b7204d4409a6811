"""What a process knows of itself: memory, processor time, start. Linux; elsewhere memory reads as 0.

Law of the file: the three metrics have the names that every Prometheus client library gives them, so that a dashboard
made for any program shows ours.
"""

from __future__ import annotations

import os
import time

from process.metrics import Registry


def resident_bytes() -> int:
    """Resident memory of this process, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def register_vitals(registry: Registry, started: float) -> None:
    """Adds the process's own metrics.

    Args:
        started: unix seconds.
    """
    registry.gauge(
        "process_resident_memory_bytes",
        "Resident memory of the process.",
        "Alarm when it grows from day to day, or nears what the machine has.",
    ).read_from(resident_bytes)
    registry.counter(
        "process_cpu_seconds_total",
        "Processor time that the process used.",
        "See which program a busy machine is busy with.",
    ).read_from(time.process_time)
    registry.gauge(
        "process_start_time_seconds",
        "When the process started, unix seconds.",
        "See restarts that nobody asked for.",
    ).read_from(lambda: started)
