"""Books of every update of a fleet of real processes: what devices made against what the aggregator has.

Laws of the file: no counter of the product is asked; what devices made comes from their witnesses (by content), where
it is now from the rows of their outboxes and of the aggregator's database, read by connections of the ledger's own,
and whether a head is what its updates make from a sum of the ledger's own, in float64. Sources: DESIGN.md, law 3;
fleet/chaos/ledger.py does the same after every commit of a simulated fleet.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fleet.real_chaos.fold_sum import check_sum
from fleet.real_chaos.outcome import Books
from wire.messages import Update, decode_body

SOUND = ("stored", "folded", "discarded")
ENDED_WELL = frozenset({"stored", "refused", "expired"})
DAMAGED = ENDED_WELL | {"destroyed"}
"""How an update may end on a device whose disk was damaged."""
CROWDED = ENDED_WELL | {"evicted"}
"""How it may end where the disk is small."""
# What an aggregator may say of an update that it keeps no row of.
_UNBOOKED = ("round_closed", "already_answered", "quarantined")
_WAIT_SECONDS = 30.0
# An order that nobody has answered for so long is nobody's work just now: it waits to be sent again.
_FRESH_SECONDS = 5.0
_BUSY_ROUND = "SELECT count(*) FROM rounds WHERE state IN ('folding', 'deciding')"
_OPEN_ROUND = "SELECT count(*) FROM rounds WHERE state NOT IN ('done', 'failed')"
_OPEN_ORDER = (
    "SELECT count(*) FROM orders JOIN rounds ON rounds.run = orders.run AND rounds.number = orders.round"
    " WHERE orders.state IN ('committed', 'sent', 'accepted') AND rounds.state NOT IN ('done', 'failed')"
    " AND orders.created > ?"
)


@dataclass(frozen=True, slots=True)
class DeviceFiles:
    """Where a device's outbox and its witness's notes are."""

    database: Path
    witness: Path


@dataclass(slots=True)
class Notes:
    """What a device's witness wrote.

    Attributes:
        bodies: by update, each content that was made for it, by its SHA-256.
        kept: updates whose commit returned.
    """

    bodies: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    kept: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path) -> Notes:
        """The whole file; a line that a kill tore says nothing."""
        notes = cls()
        lines = path.read_bytes().splitlines() if path.exists() else []
        for line in lines:
            try:
                note = json.loads(line)
            except ValueError:
                continue
            if "made" in note:
                body = bytes.fromhex(note["body"])
                notes.bodies[note["made"]][hashlib.sha256(body).hexdigest()] = body
            else:
                notes.kept.add(note["kept"])
        return notes


@dataclass(frozen=True, slots=True)
class Place:
    """An outbox row as it lies on the disk."""

    state: str
    reason: str
    ended_at: float
    deadline: float


@dataclass(frozen=True, slots=True)
class CloudRow:
    """A reply as the aggregator has it."""

    order_id: str
    round_number: int
    device: str
    kind: str
    state: str
    body_sha256: str


class Ledger:
    """The books of one fleet.

    Args:
        cloud: the aggregator's database.
        devices: by name.
        blob: an artefact by its SHA-256 (hex).
    """

    def __init__(self, cloud: Path, devices: Mapping[str, DeviceFiles], blob: Callable[[str], bytes]) -> None:
        self._cloud = cloud
        self._devices = dict(devices)
        self._blob = blob
        # Ended rows leave an outbox one day: what was seen once stays seen.
        self._seen: dict[str, dict[str, Place]] = defaultdict(dict)

    def watch(self, device: str, files: DeviceFiles) -> None:
        """One more device."""
        self._devices[device] = files

    # ---- while the fleet runs ----------------------------------------------------------------------------------

    def open_updates(self) -> set[str]:
        """Updates that devices owe now."""
        for device in self._devices:
            self._read_device(device)
        return {
            update
            for places in self._seen.values()
            for update, place in places.items()
            if place.state not in ("stored", "refused", "expired", "evicted", "destroyed")
        }

    def is_in_flight(self, device: str = "") -> bool:
        """Whether there is work that a fault could harm: of a device, or of anybody."""
        fresh = time.time() - _FRESH_SECONDS
        if device:
            return self._owes(device) or bool(
                self._ask(f"{_OPEN_ORDER} AND orders.device = ?", fresh, device)
            )
        return bool(self._ask(_OPEN_ORDER, fresh) or self._ask(_BUSY_ROUND)) or any(
            map(self._owes, self._devices)
        )

    def is_at_rest(self) -> bool:
        """Whether no round is open and nobody owes anything."""
        return not self._ask(_OPEN_ROUND) and not any(map(self._owes, self._devices))

    def rounds_done(self) -> int:
        """Rounds that moved the head."""
        return self._ask("SELECT count(*) FROM rounds WHERE state = 'done'")

    def _owes(self, device: str) -> bool:
        path = self._devices[device].database
        if not path.exists():
            return False
        with _reader(path) as reader:
            found: int = reader.execute(
                "SELECT count(*) FROM outbox WHERE state NOT IN"
                " ('stored', 'refused', 'expired', 'evicted', 'destroyed')"
            ).fetchone()[0]
        return found > 0

    def _ask(self, sql: str, *values: str | float) -> int:
        with _reader(self._cloud) as reader:
            return int(reader.execute(sql, values).fetchone()[0])

    # ---- when nothing moves any more ---------------------------------------------------------------------------

    def reconcile(
        self, *, ends: frozenset[str] = ENDED_WELL, worn: Mapping[str, frozenset[str]] | None = None
    ) -> Books:
        """Compares all that was made with all that is there.

        Args:
            ends: how an update may end on a device.
            worn: by device, other ends (`DAMAGED`: its disk was).
        """
        with _reader(self._cloud) as reader:
            # One moment: rows and head belong together.
            reader.execute("BEGIN")
            return self._reconcile(reader, ends, worn or {})

    def _reconcile(
        self, reader: sqlite3.Connection, ends: frozenset[str], worn: Mapping[str, frozenset[str]]
    ) -> Books:
        cloud = _read_cloud(reader)
        books = _Finding()
        bodies: dict[str, bytes] = {}
        for device, files in self._devices.items():
            notes = Notes.read(files.witness)
            self._read_device(device)
            allowed = worn.get(device, ends)
            places = self._seen[device]
            for update in sorted(notes.kept | places.keys()):
                books.updates += 1
                if update not in notes.bodies:
                    books.altered_by(device, update, "is in the outbox, and nobody made it")
                _judge(books, device, update, places.get(update), cloud.get(update), allowed)
            for update, row in cloud.items():
                if row.device == device:
                    _judge_arrival(books, device, update, row, notes)
                    bodies[update] = notes.bodies.get(update, {}).get(row.body_sha256, b"")
        self._judge_cloud(books, reader, cloud, bodies)
        return books.close()

    def _judge_cloud(
        self,
        books: _Finding,
        reader: sqlite3.Connection,
        cloud: Mapping[str, CloudRow],
        bodies: Mapping[str, bytes],
    ) -> None:
        """Two sound answers to one order, rows of nobody, and whether the head is the sum of what was folded."""
        sound = Counter(row.order_id for row in cloud.values() if row.state in SOUND)
        for order, count in sound.items():
            if count > 1:
                books.doubled_by("cloud", order, f"has {count} sound answers")
        for update, row in cloud.items():
            if row.device not in self._devices:
                books.altered_by(row.device, update, "came from a device that is none of ours")
        folded: dict[int, list[Update]] = defaultdict(list)
        for update, row in cloud.items():
            if row.state == "folded" and row.kind == "train":
                if not bodies.get(update):
                    return  # said above; a sum without it says nothing
                folded[row.round_number].append(decode_body(bodies[update], Update))
        if complaint := check_sum(reader, folded, self._blob):
            books.doubled_by("cloud", "the head", complaint)

    def _read_device(self, device: str) -> None:
        path = self._devices[device].database
        if not path.exists():
            return
        sql = "SELECT hex(update_id), state, reason, ended_at, deadline FROM outbox"
        with _reader(path) as reader:
            for name, *values in reader.execute(sql):
                self._seen[device][name.lower()] = Place(*values)


@dataclass(slots=True)
class _Finding:
    """Books that are still being written."""

    updates: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    owed: int = 0
    places: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    def lost_by(self, device: str, update: str, why: str) -> None:
        self.lost += 1
        self.complaints.append(f"{device}: update {update} {why}: lost")

    def doubled_by(self, who: str, what: str, why: str) -> None:
        self.doubled += 1
        self.complaints.append(f"{who}: {what} {why}: doubled")

    def altered_by(self, device: str, update: str, why: str) -> None:
        self.altered += 1
        self.complaints.append(f"{device}: update {update} {why}: altered")

    def close(self) -> Books:
        return Books(
            self.updates,
            self.lost,
            self.doubled,
            self.altered,
            self.owed,
            self.places,
            tuple(self.complaints),
        )


def _judge(
    books: _Finding,
    device: str,
    update: str,
    place: Place | None,
    row: CloudRow | None,
    allowed: frozenset[str],
) -> None:
    """Where one update is, and whether it may be there."""
    books.places[row.state if row is not None else f"device {place.state if place else 'nowhere'}"] += 1
    if row is not None:
        if place is not None and place.state == "stored" and row.state not in SOUND:
            books.lost_by(device, update, f"was given up as stored, and the aggregator has it as {row.state}")
        if place is not None and place.state == "refused" and row.state in SOUND:
            books.complaints.append(f"{device}: update {update} is {row.state}, and was told: {place.reason}")
        return
    if place is None:
        books.lost_by(device, update, "is nowhere")
    elif place.state == "open":
        books.owed += 1
    elif place.state == "stored":
        books.lost_by(device, update, "was given up as stored, and the aggregator does not have it")
    elif place.state == "refused" and place.reason not in _UNBOOKED:
        books.lost_by(device, update, f"was refused ({place.reason}), and the aggregator has no row of it")
    elif place.state == "expired" and place.ended_at < place.deadline:
        books.lost_by(device, update, "expired before its deadline")
    elif place.state not in allowed:
        books.lost_by(device, update, f"ended as {place.state} ({place.reason})")


def _judge_arrival(books: _Finding, device: str, update: str, row: CloudRow, notes: Notes) -> None:
    made = notes.bodies.get(update)
    if made is None:
        books.altered_by(device, update, "is in the aggregator's books, and nobody made it")
    elif row.body_sha256 not in made:
        books.altered_by(device, update, "has a content that nobody made")
    elif update not in notes.kept and row.state in SOUND:
        # Its commit did not return, and it was sent nevertheless: it is in the outbox, or it should not have left.
        books.places["sent by a life that ended in its commit"] += 1


def _read_cloud(reader: sqlite3.Connection) -> dict[str, CloudRow]:
    sql = "SELECT update_id, order_id, round, device, kind, state, body_sha256 FROM updates"
    return {update: CloudRow(*values) for update, *values in reader.execute(sql)}


@contextmanager
def _reader(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that writes nothing; waits for a process that is recovering the file."""
    with closing(sqlite3.connect(path, timeout=_WAIT_SECONDS, isolation_level=None)) as connection:
        connection.execute("PRAGMA query_only = ON")
        yield connection
