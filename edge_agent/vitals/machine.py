"""The machine around an agent, as its health sees it: disk, sensors, certificate, and what can be done about them.

Law of the file: a reading that fails is None, never an error; a simulated device has no machine (`NoMachine`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from edge_agent.enrolment.identity import Identity
from wire.certificate_dates import validity_of
from wire.errors import TrustError

SENSORS: Final = Path("/sys/class/thermal")
_MILLI: Final = 1000.0
_LEAST_CELSIUS, _MOST_CELSIUS = 1.0, 250.0
"""A sensor that is off says 0 or something absurd."""


class Machine(Protocol):
    """What the health of a device needs beyond the agent's own parts."""

    def free_bytes(self) -> int | None:
        """On the disk of the state folder."""
        ...

    def celsius(self) -> float | None:
        """The hottest sensor."""
        ...

    def certificate(self) -> tuple[float, float] | None:
        """From when until when the certificate on disk is valid, unix seconds."""
        ...

    def rejoin(self, reason: str) -> None:
        """Leaves the broker and joins it again."""
        ...

    def clear_leavings(self) -> None:
        """Deletes what can be had again; no release check or self-test runs meanwhile."""
        ...


class NoMachine:
    """Of a simulated device: nothing is known, and nothing can be done."""

    def free_bytes(self) -> int | None:
        return None

    def celsius(self) -> float | None:
        return None

    def certificate(self) -> tuple[float, float] | None:
        return None

    def rejoin(self, reason: str) -> None:
        """There is no connection."""

    def clear_leavings(self) -> None:
        """There is no disk."""


class RealMachine:
    """A device's.

    Args:
        folder: the state folder.
        rejoin: see `Machine.rejoin`.
        clear: see `Machine.clear_leavings`.
        sensors: where Linux shows thermal zones.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        *,
        rejoin: Callable[[str], None],
        clear: Callable[[], None],
        sensors: Path = SENSORS,
    ) -> None:
        self._folder = folder
        self._certificate = identity.certificate_path if identity.folder is not None else None
        self._rejoin = rejoin
        self._clear = clear
        self._sensors = sensors
        self._read: tuple[bytes, tuple[float, float]] | None = None

    def free_bytes(self) -> int | None:
        return free_bytes(self._folder)

    def celsius(self) -> float | None:
        return hottest(self._sensors)

    def certificate(self) -> tuple[float, float] | None:
        if self._certificate is None:
            return None
        try:
            pem = self._certificate.read_bytes()
            if self._read is None or self._read[0] != pem:
                self._read = (pem, validity_of(pem))
        except (OSError, TrustError):
            return None
        return self._read[1]

    def rejoin(self, reason: str) -> None:
        self._rejoin(reason)

    def clear_leavings(self) -> None:
        self._clear()


def free_bytes(folder: Path) -> int | None:
    """What a user without privileges can still write there."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def hottest(sensors: Path = SENSORS) -> float | None:
    """The highest plausible reading of Linux's thermal zones, in degrees Celsius; None without any."""
    found = []
    with contextlib.suppress(OSError):
        for zone in sensors.glob("thermal_zone*/temp"):
            with contextlib.suppress(OSError, ValueError):
                found.append(int(zone.read_text(encoding="ascii")) / _MILLI)
    plausible = [celsius for celsius in found if _LEAST_CELSIUS <= celsius <= _MOST_CELSIUS]
    return max(plausible, default=None)
