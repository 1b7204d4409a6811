"""Every file and folder of a device's state replaced: by noise, by nothing, by the other kind; then the agent starts.

Laws of the file: it serves, from the factory slot where there is no other, and goes on to deliver what it owes unless
that was what went; what cannot be what it is called is in the quarantine with a reason.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edge_agent.store.storage import DATABASE_NAME
from fleet.real_chaos.damaged_outbox import LOG_NAME
from fleet.real_chaos.device_path import DevicePath
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.owing import Ended, OwingDevice
from fleet.real_chaos.paths import Findings, workshop
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.victim import Nursery

How = Literal["noise", "empty", "folder", "file"]

NOISE_BYTES: Final = 5000
GONE_WITH: Final = {
    (DATABASE_NAME, "folder"),
    (LOG_NAME, "noise"),
    (LOG_NAME, "empty"),
    (LOG_NAME, "folder"),
}
"""What took the outbox with it: the device that was killed had all that it owed in its log."""
WITHOUT_MODEL: Final = {("slots", "file")}
"""What took every slot with it: it answers again when it has fetched a release."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """What lies in a place now."""

    name: str
    how: How

    def __str__(self) -> str:
        return f"{self.name} is {self.how}"


def replacements(folder: Path) -> list[Replacement]:
    """Every one of a state folder."""
    found = []
    for path in sorted(folder.rglob("*")):
        kinds: tuple[How, ...] = ("file",) if path.is_dir() else ("noise", "empty", "folder")
        found += [Replacement(str(path.relative_to(folder)), how) for how in kinds]
    return found


def replace(folder: Path, what: Replacement) -> None:
    """Does it."""
    place = folder / what.name
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    if what.how == "folder":
        place.mkdir()
        (place / "inside").write_bytes(b"somebody's")
    else:
        place.write_bytes(b"" if what.how == "empty" else random.Random(what.name).randbytes(NOISE_BYTES))


def start_with(device: OwingDevice, folder: Path, what: Replacement, place: Path) -> Ended:
    """Replaces something in a copy of a device's folder and starts it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    replace(place, what)
    is_gone = (what.name, what.how) in GONE_WITH
    may_be_silent = (what.name, what.how) in WITHOUT_MODEL
    ended = device.play(place, is_outbox_gone=is_gone, may_be_silent=may_be_silent)
    is_kind_wrong = what.how in ("folder", "file") and "/" not in what.name
    if is_kind_wrong and not ended.quarantined:
        ended.findings.wrong("it is not in the quarantine")
    return ended


def _play(task: Task) -> Outcome:
    started, struck, found = time.monotonic(), Counter[str](), Findings()
    with workshop(task.bundle) as bench, Nursery("device") as nursery:
        device = OwingDevice(bench, nursery, DevicePath(bench, nursery))
        folder = bench.root / "owing"
        device.prepare(folder, is_killed=True)
        every = replacements(folder)
        first = task.seed * task.faults % len(every)
        chosen = (every * 2)[first : first + min(task.faults, len(every))]
        for number, what in enumerate(chosen, start=1):
            if task.is_over:
                break
            ended = start_with(device, folder, what, bench.root / "foreign")
            struck[what.how] += 1
            found.add(ended.findings, str(what))
            task.tell(number)
    return task.outcome("foreign_files", found.books(), struck, started)


SCENARIOS = (Scenario("foreign_files", "each file and folder of a device replaced by something else", _play),)
