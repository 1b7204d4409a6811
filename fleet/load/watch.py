"""What the processes of a load cost while it runs: CPU, memory and the aggregator's queues, read every five seconds.

Laws of the file: costs are the system's word (`/proc`), not a process's own; the queues are what an operator sees at
the metrics port.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from fleet.processes import children, own_cpu_seconds, peak_mib

_SECONDS = 5.0
_SAMPLE = re.compile(r"^(\w+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)
UP, DOWN = 'shoal_messages_waiting{direction="up"}', 'shoal_messages_waiting{direction="down"}'
_PEAKS = {"events": UP, "packets": DOWN, "transfers": "shoal_transfers_open"}


def broker_of(aggregator: int) -> int:
    """The process of the mosquitto that an aggregator started; 0 while there is none."""
    for process_id in children(aggregator):
        with contextlib.suppress(OSError):
            if (Path("/proc") / str(process_id) / "comm").read_text(encoding="ascii").strip() == "mosquitto":
                return process_id
    return 0


def scrape(port: int) -> Mapping[str, float]:
    """All samples of a metrics port of this machine, by name and labels as they stand there; empty without answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode("utf-8")
    except (OSError, http.client.HTTPException):
        return {}
    finally:
        connection.close()
    return {name: float(value) for name, value in _SAMPLE.findall(text)}


class Watch:
    """Reads every five seconds, on a thread of its own, until `stop`.

    Args:
        roles: processes by what they are in the report.
        metrics_port: the aggregator's.

    Attributes:
        peaks: the longest that each queue was seen.
    """

    def __init__(self, roles: Mapping[str, Sequence[int]], metrics_port: int) -> None:
        self._roles = roles
        self._port = metrics_port
        self._ended = threading.Event()
        self.peaks = dict.fromkeys(_PEAKS, 0)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time that each role has used so far."""
        return {role: sum(map(own_cpu_seconds, processes)) for role, processes in self._roles.items()}

    def peak_mib(self) -> dict[str, float]:
        """The largest resident memory of each role's processes, summed."""
        return {role: sum(map(peak_mib, processes)) for role, processes in self._roles.items()}

    def stop(self) -> None:
        """No reading after this."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS):
            samples = scrape(self._port)
            for name, series in _PEAKS.items():
                self.peaks[name] = max(self.peaks[name], int(samples.get(series, 0)))
