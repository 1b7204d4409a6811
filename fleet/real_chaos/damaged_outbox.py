"""Flipped bits in every page of an outbox's database, and in every frame of the log that a crash left beside it.

Laws of the file: each update that was owed arrives as made, or is counted as destroyed and the aggregator is told
which order waits in vain; nothing else arrives; inference is answered all the time. One thing cannot be known: many
flipped bits in the very last frame look like a commit that a power cut ended, so one bit is flipped there.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_agent.store.storage import DATABASE_NAME
from fleet.real_chaos.device_path import DevicePath
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.owing import Ended, OwingDevice
from fleet.real_chaos.paths import Findings, workshop
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.victim import Nursery

LOG_NAME: Final = f"{DATABASE_NAME}-wal"
PAGE_BYTES: Final = 4096
LOG_HEAD_BYTES, FRAME_BYTES = 32, 4120
BITS: Final = (1, 8)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where bits flip, and how many."""

    file: str
    start: int
    size: int
    bits: int

    def __str__(self) -> str:
        return f"{self.bits} bits of {self.file} from {self.start}"


def spots(folder: Path, file: str) -> Iterator[Spot]:
    """Every page of a database, or the header and every frame of a log."""
    size = (folder / file).stat().st_size
    if file == DATABASE_NAME:
        cells = [(start, PAGE_BYTES) for start in range(0, size, PAGE_BYTES)]
    else:
        frames = range(LOG_HEAD_BYTES, size - FRAME_BYTES + 1, FRAME_BYTES)
        cells = [(0, LOG_HEAD_BYTES), *((start, FRAME_BYTES) for start in frames)]
    for start, length in cells:
        is_last = file == LOG_NAME and start == cells[-1][0]
        for bits in BITS[:1] if is_last or length == LOG_HEAD_BYTES else BITS:
            yield Spot(file, start, length, bits)


def flip(folder: Path, spot: Spot, rng: random.Random) -> None:
    """Flips the bits."""
    path = folder / spot.file
    data = bytearray(path.read_bytes())
    for place in rng.sample(range(spot.start, min(spot.start + spot.size, len(data))), spot.bits):
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def damage(device: OwingDevice, folder: Path, spot: Spot, place: Path, seed: int) -> Ended:
    """Flips bits of a copy of a device's folder and starts it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    flip(place, spot, random.Random(f"{seed} {spot}"))
    ended = device.play(place)
    if ended.told < ended.destroyed:
        ended.findings.wrong(f"{ended.destroyed} are destroyed, the aggregator was told of {ended.told}")
    return ended


def _play(task: Task) -> Outcome:
    started, struck, found, destroyed = time.monotonic(), Counter[str](), Findings(), 0
    with workshop(task.bundle) as bench, Nursery("device") as nursery:
        device = OwingDevice(bench, nursery, DevicePath(bench, nursery))
        every: list[tuple[Path, Spot]] = []
        for name, is_killed in ((DATABASE_NAME, False), (LOG_NAME, True)):
            folder = bench.root / f"owing-{name}"
            device.prepare(folder, is_killed=is_killed)
            every += [(folder, spot) for spot in spots(folder, name)]
        first = task.seed * task.faults % len(every)
        chosen = (every * 2)[first : first + min(task.faults, len(every))]
        for number, (folder, spot) in enumerate(chosen, start=1):
            if task.is_over:
                break
            ended = damage(device, folder, spot, bench.root / "damaged", task.seed)
            struck[f"{spot.file} {spot.bits} bits"] += 1
            destroyed += ended.destroyed
            found.add(ended.findings, str(spot))
            task.tell(number)
    return task.outcome("damaged_outbox", found.books(destroyed=destroyed), struck, started)


SCENARIOS = (
    Scenario("damaged_outbox", "bits flip in each page of an outbox, and in each frame of its log", _play),
)
