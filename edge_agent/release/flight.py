"""Whether this program was answering when it last ended: what a model leaves behind that kills its process.

A self-test and a watch window see what a model does with golden inputs and the first windows after a swap. One that
takes the process along with a certain input (ONNX Runtime 1.31 divides the smallest integer by minus one, and gets a
SIGFPE) may do so after it was trusted. Laws of the file: an answer pays one store into memory for it; what lies there
after a power cut, or is damaged, says nothing; a program that was killed from outside is not held against its model,
unless that happens in the middle of answers again and again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from edge_agent.release.slot_store import SlotStore
from edge_agent.store.storage import Database
from process.logs import get_logger
from wire.errors import BundleError, StorageError

_log = get_logger("edge_agent.release.flight")

NAME: Final = "ANSWERING"
DEATHS_FACT: Final = "deaths_while_answering"
DEATHS: Final = 3
"""Of a release that is trusted, within `WITHIN_SECONDS`; one on probation goes back after the first."""
WITHIN_SECONDS: Final = 3600.0
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")
_BOOT_CHARS: Final = 36


class FlightRecorder:
    """How many answers are being worked out, in a file that outlives the process and not the machine.

    Attributes:
        died_answering: the program that had this file last, since the machine was started, ended in the middle of one.
    """

    def __init__(self, folder: Path) -> None:
        path, boot = folder / NAME, _boot_id()
        self._map: mmap.mmap | None = None
        self.died_answering = False
        with contextlib.suppress(OSError, ValueError):
            left = path.read_bytes() if path.exists() else b""
            self.died_answering = left[1:] == boot and left[:1] != b"\0" and bool(boot)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, b"\0" + boot)
                self._map = mmap.mmap(descriptor, 1 + len(boot))
            finally:
                os.close(descriptor)

    def note(self, in_flight: int) -> None:
        """So many answers are being worked out now."""
        if self._map is not None:
            self._map[0] = min(in_flight, 255)


def go_back_after_deaths(
    recorder: FlightRecorder, slots: SlotStore, database: Database, now: Callable[[], float]
) -> bool:
    """At a start: takes the release back whose answers end the process; whether it did.

    A full disk or a damaged slot keeps nobody from serving what is there.
    """
    current = slots.current() if recorder.died_answering else None
    if current is None:
        return False
    name, at = current.release_sha256, now()
    try:
        known, count, since = str(database.fact(DEATHS_FACT) or "::0").split(":")
        is_again = known == name and 0.0 <= at - float(since) <= WITHIN_SECONDS
        deaths, first = (int(count) + 1, float(since)) if is_again else (1, at)
        database.set_fact(DEATHS_FACT, f"{name}:{deaths}:{first}")
        _log.warning("died_while_answering", version=current.version, deaths=deaths)
        if deaths < (1 if slots.on_probation else DEATHS):
            return False
        back = slots.roll_back()
    except (StorageError, BundleError, ValueError) as error:
        _log.error("deaths_not_noted", reason=str(error))
        return False
    if back is None or back.release_sha256 == name:
        return False
    reason = "the agent died while it answered"
    _log.warning("release_rolled_back", version=current.version, to=back.version, reason=reason)
    return True


def _boot_id() -> bytes:
    """Of this start of the machine; empty where the system does not tell."""
    try:
        return _BOOT.read_bytes().strip()[:_BOOT_CHARS]
    except OSError:
        return b""
