"""What can go wrong, where, and the schedule that a seed makes of it. Pure, frozen data.

Laws of the file: a fault is named by the point where it strikes; it waits there until work in flight comes by; what it
draws follows from its own seed, so that a schedule without some of its faults leaves the others as they were (which is
what shrinking needs). Source: docs/architecture.md, "The simulation under faults".
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

COMMIT: Final = ("crash_before", "crash_torn", "crash_after", "disk_full")
STEP: Final = ("crash_before", "crash_after")
PACKET: Final = ("lose", "double", "reorder", "late", "truncate", "corrupt", "cut")
CLOCK: Final = ("clock_1970", "clock_2040", "clock_ahead", "clock_behind")
UPDATES_PER_FAULT: Final = 10


def _points(prefix: str, names: Iterable[str], kinds: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    return {f"{prefix}.{name}": kinds for name in names}


POINTS: Final[Mapping[str, tuple[str, ...]]] = {
    # A device's database, by what the commit is about; its other files; its worker; its packets.
    **_points("device.commit", ("outbox", "sealing", "receipt", "order", "sequence", "window"), COMMIT),
    **_points("device.slot", ("write", "rename", "remove", "sync"), ("crash_before", "disk_full")),
    "device.disk.rot": ("bits",),
    **_points("device.job", ("train", "evaluate", "update"), ("crash_before", "slow")),
    "device.selftest": STEP,
    "device.fetch": ("crash_before", "lose", "truncate", "corrupt"),
    **_points("device.receive", ("rd", "cm", "ak", "bl", "md", "mask"), STEP),
    **_points("device.publish", ("st", "jn", "up", "mask"), STEP),
    "device.clock": CLOCK,
    # The aggregator's database and store, its turns, its packets.
    **_points(
        "cloud.commit", ("update", "open", "charge", "step", "fold", "round", "device", "release"), COMMIT
    ),
    **_points("cloud.store", ("blob", "release", "sign"), (*STEP, "disk_full")),
    "cloud.tick": STEP,
    **_points("cloud.receive", ("st", "jn", "up", "mask"), STEP),
    **_points("cloud.publish", ("rd", "cm", "ak", "bl", "md", "mask"), STEP),
    "cloud.clock": CLOCK,
    "cloud.rival": ("second",),
    # The way between a device and the broker, and between the broker and the aggregator.
    **_points("up", ("st", "jn", "up", "mask"), PACKET),
    **_points("down", ("rd", "cm", "ak", "bl", "md", "mask"), PACKET),
    **_points("in", ("st", "jn", "up", "mask"), ("lose", "double", "reorder", "late", "cut")),
    "network.device": ("partition",),
    "network.cloud": ("partition",),
    # Half of the fleet is cut off in the moment in which a ring is signed.
    "network.release": ("partition",),
    "broker": ("amnesia",),
    # The way to the other party of a run with two servers.
    "helper.ask": ("lose", "answer_lost", "late"),
    # What a person does at a bad moment: a device is trusted no more while it owes an update; a release goes back.
    "operator.revoke": ("mid_round",),
    "operator.rollback": ("signed",),
}
"""Every point, and what can happen there."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        number: its place in the schedule it was made in; it keeps it when others are left out.
        after: it waits at its point once so many updates were made.
        seed: of everything it draws (how long, which bytes).
    """

    number: int
    after: int
    point: str
    kind: str
    seed: int

    def rng(self) -> random.Random:
        """Draws of this fault alone."""
        return random.Random(f"fault {self.seed}")

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_schedule(
    seed: int, count: int, points: Sequence[str] = tuple(POINTS), *, place: int | None = None, rare: int = 0
) -> tuple[Fault, ...]:
    """The faults of a seed: the points in an order of its own, again and again, so that none is left out for long.

    Args:
        points: that its history passes.
        place: of the seed among those whose histories pass the same points; the seed itself where all do.
        rare: so many of `points` few histories pass; they come first.
    """
    rng = random.Random(f"schedule {seed}")
    faults: list[Fault] = []
    place = seed if place is None else place
    # Seeds with few faults each begin somewhere else, so that a campaign of them visits every point.
    seldom, often = list(points[:rare]), list(points[rare:])
    shuffled = random.Random(f"points {place // len(points)}")
    shuffled.shuffle(seldom)
    shuffled.shuffle(often)
    order = seldom + often
    start = (place * count) % len(order)
    for number in range(count):
        point = order[(start + number) % len(order)]
        kinds = POINTS[point]
        # A point's kinds take turns over rounds of the list; the draw decides which one begins.
        kind = kinds[(rng.randrange(len(kinds)) + number // len(order)) % len(kinds)]
        after = number * UPDATES_PER_FAULT + rng.randrange(UPDATES_PER_FAULT)
        faults.append(Fault(number, after, point, kind, rng.getrandbits(32)))
    return tuple(faults)
