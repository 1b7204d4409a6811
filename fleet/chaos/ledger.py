"""What must be true of every update, whatever happens: books of its own, kept beside the product's.

Laws of the file: nothing here asks an object or a counter of the product; what is known comes from what devices trained
(by content), from the rows that lie on the disks after each commit, read by a connection of the ledger's own, and from
the packets and signed files that left; the first thing that is not as it must be ends the history. Sources: DESIGN.md,
laws 2, 3 and 5; docs/architecture.md, "The simulation under faults".
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.outbox import ENDED_ROWS_KEPT
from edge_agent.settings import StorageSettings
from fleet.chaos.fold_check import FoldCheck, Folded
from fleet.chaos.network import kind_of
from fleet.chaos.sqlite import Change
from wire import envelope
from wire.chunks import parse
from wire.cose import read_content, read_sign1
from wire.messages import Evaluation, Receipt, Update, decode_body, encode_body
from wire.transport import Packet

SOUND = ("stored", "folded", "discarded")
ENDED = ("stored", "refused", "expired", "evicted", "destroyed")
_LENGTH_BYTES = 4
_OPEN_BYTES = (
    "SELECT total(length(body) + coalesce(length(sealed), 0)) FROM outbox LEFT JOIN sealings USING (row)"
    " WHERE state = 'open'"
)


@dataclass(frozen=True, slots=True)
class Violation:
    """Something that must never be: virtual seconds, who, what."""

    at: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.at:.3f} s, {self.who}: {self.what}"


class ViolationError(Exception):
    """Ends a history."""

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))
        self.violation = violation


@dataclass(frozen=True, slots=True)
class CloudRow:
    """A reply as the aggregator has it."""

    order_id: str
    round_number: int
    device: str
    kind: str
    state: str
    reason: str
    body_sha256: str


class Ledger:
    """The books of one history.

    Args:
        now: virtual seconds.
        device_now: what a device goes by when it lets an update expire (unix seconds).
        fold_check: refolds every aggregate.
        caps: what a device may use of its disk.
    """

    def __init__(
        self,
        now: Callable[[], float],
        device_now: Callable[[str], float],
        fold_check: FoldCheck,
        caps: StorageSettings,
    ) -> None:
        self._caps = caps
        self._now = now
        self._device_now = device_now
        self._fold_check = fold_check
        self._bodies: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.made: dict[str, str] = {}
        self.on_device: dict[str, str] = {}
        self.in_cloud: dict[str, CloudRow] = {}
        self.receipts: dict[str, set[str]] = defaultdict(set)
        self.rotten: set[str] = set()
        self.revoked_devices: set[str] = set()
        self.moved = 0
        self.violations: list[Violation] = []
        self.is_round_open = False
        self._readers: dict[str, sqlite3.Connection] = {}
        self._first_open: Counter[str] = Counter()
        self._numbers: dict[tuple[str, str, int, int], bytes] = {}
        self._signed: set[str] = set()
        self._passed: set[tuple[str, str]] = set()
        self._served: dict[str, list[int]] = defaultdict(list)
        self._last_update = 0
        self._last_fold = 0
        self._fence = 0

    # ---- what it all comes to ----------------------------------------------------------------------------------

    @property
    def is_in_flight(self) -> bool:
        """Whether there is work that a fault could harm."""
        return self.is_round_open or any(state == "open" for state in self.on_device.values())

    @property
    def open_ids(self) -> set[str]:
        """Updates that devices owe, but for those whose device is revoked: nobody takes them any more."""
        return {
            update
            for update, state in self.on_device.items()
            if state == "open" and self.made[update] not in self.revoked_devices
        }

    def violated(self, who: str, what: str) -> None:
        """Notes what must never be.

        Raises:
            ViolationError: always.
        """
        violation = Violation(self._now(), who, what)
        self.violations.append(violation)
        raise ViolationError(violation)

    def standings(self) -> Counter[str]:
        """How many updates there are in each place: the aggregator's word where it has one, else the device's."""
        found: Counter[str] = Counter()
        for update in self.made:
            row = self.in_cloud.get(update)
            found[row.state if row is not None else f"device {self.on_device[update]}"] += 1
        return found

    # ---- devices -----------------------------------------------------------------------------------------------

    def trained(self, body: Update | Evaluation) -> None:
        """A device has made this; it counts once it is in an outbox."""
        encoded = encode_body(body)
        self._bodies[body.update_id.hex()][hashlib.sha256(encoded).hexdigest()] = encoded

    def device_restarted(self, device: str) -> None:
        """What was read before says nothing any more: the disk decides."""
        self._close_reader(device)
        self._first_open[device] = 0

    def device_committed(self, device: str, path: Path, changes: frozenset[Change]) -> None:
        """Reads what a commit left, if it was about the outbox."""
        if any(table == "outbox" for _, table in changes):
            self.read_device(device, path)

    def owes(self, device: str) -> bool:
        """Whether a device owes an update."""
        return any(
            state == "open" and self.made[update] == device for update, state in self.on_device.items()
        )

    def read_device(self, device: str, path: Path) -> None:
        """Compares the outbox with the books. Of a worn disk only that nothing is gone without a word."""
        if device not in self.rotten:
            self._read_device(device, path)
            return
        # The agent may have put a fresh file in its place, and may find tomorrow what is damaged today.
        self._close_reader(device)
        self._first_open[device] = 0
        try:
            self._read_device(device, path)
        except sqlite3.DatabaseError:
            return

    def _read_device(self, device: str, path: Path) -> None:
        sql = "SELECT row, hex(update_id), state, reason, deadline FROM outbox WHERE row >= ? ORDER BY row"
        first = self._first_open[device]
        rows = self._reader(device, path).execute(sql, (first,)).fetchall()
        seen = set()
        self._first_open[device] = rows[-1][0] + 1 if rows else first
        self._check_room(device, path)
        for row, name, state, reason, deadline in reversed(rows):
            update = name.lower()
            seen.add(update)
            if state == "open":
                self._first_open[device] = row
            self._note_device(device, update, state, reason, deadline)
        is_whole = first == 0 and device not in self.rotten and len(seen) < ENDED_ROWS_KEPT
        for update, owner in self.made.items():
            if owner != device or update in seen:
                continue
            if self.on_device[update] == "open":
                self.violated(device, f"update {update} is gone from the outbox: lost")
            if is_whole:
                self.violated(device, f"the end of update {update} ({self.on_device[update]}) is gone: lost")

    def _check_room(self, device: str, path: Path) -> None:
        (held,) = self._reader(device, path).execute(_OPEN_BYTES).fetchone()
        if held > self._caps.outbox_bytes:
            self.violated(device, f"the outbox holds {held:.0f} bytes of {self._caps.outbox_bytes}")
        size = path.stat().st_size
        if size > self._caps.database_bytes:
            self.violated(device, f"the database has {size} bytes of {self._caps.database_bytes}")

    def _note_device(self, device: str, update: str, state: str, reason: str, deadline: float) -> None:
        before = self.on_device.get(update)
        if before == state:
            return
        if before is not None and before != "open" and device not in self.rotten:
            self.violated(device, f"update {update} was {before} and is {state}")
        if before is None:
            if not self._bodies.get(update):
                self.violated(device, f"update {update} is in the outbox and nobody made it")
            self.made[update] = device
        self.on_device[update] = state
        if state != "open":
            self._check_end(device, update, state, reason, deadline)

    def _check_end(self, device: str, update: str, state: str, reason: str, deadline: float) -> None:
        row = self.in_cloud.get(update)
        if state == "stored" and (row is None or row.state not in SOUND):
            self.violated(device, f"update {update} was given up as stored, and is not: lost")
        if state == "refused" and "refused" not in self.receipts[update]:
            self.violated(device, f"update {update} was given up as refused, and nobody refused it: lost")
        if state == "expired" and deadline >= self._device_now(device):
            self.violated(device, f"update {update} expired before its deadline: lost")
        if state == "destroyed" and device not in self.rotten:
            self.violated(device, f"update {update} was destroyed on a sound disk ({reason}): lost")
        if state not in ENDED:
            self.violated(device, f"update {update} is {state}")

    def device_sent(self, device: str, packet: Packet) -> None:
        """No two messages of a device have the same numbers."""
        message = packet.payload
        if kind_of(packet) == "up":
            chunk = parse(message)
            if chunk.total > 1:
                return
            message = chunk.piece
        header = envelope.peek(message)
        key = (device, header.type, header.epoch, header.seq)
        digest = hashlib.sha256(message).digest()
        if self._numbers.setdefault(key, digest) != digest:
            self.violated(
                device, f"two messages {header.type} have epoch {header.epoch} and seq {header.seq}"
            )

    # ---- models ------------------------------------------------------------------------------------------------

    def written(self, key: str, data: bytes, fence: int = 0) -> None:
        """Learns which releases are signed, from the signed file itself."""
        self._check_fence(fence, f"signed or wrote {key}")
        if key.startswith("tuf/metadata/") and key.endswith(".parameters.json"):
            targets: Mapping[str, Any] = json.loads(data)["signed"]["targets"]
            for path, target in targets.items():
                if path.endswith("/release.json"):
                    self._signed.add(target["hashes"]["sha256"])

    def passed_selftest(self, device: str, release_sha256: str) -> None:
        """A release passed its self-test there."""
        self._passed.add((device, release_sha256))

    def served(self, device: str, version: int, release_sha256: str) -> None:
        """A release answered an inference there."""
        history = self._served[device]
        if history and history[-1] == version:
            return
        if release_sha256 not in self._signed:
            self.violated(device, f"serves release {version}, which nobody signed")
        if (device, release_sha256) not in self._passed:
            self.violated(device, f"serves release {version}, which did not pass its self-test there")
        if history and version < max(history):
            # A release that did not survive its watch goes back to the one before it, and to no other.
            before = history[history.index(max(history)) - 1] if history.index(max(history)) else 0
            if version != before:
                self.violated(device, f"serves release {version} after {max(history)}")
        history.append(version)

    def no_model(self, device: str) -> None:
        """Nothing answers there just now."""
        if self._served[device]:
            self.violated(device, "nothing answers, although it has had a model")

    # ---- the aggregator ----------------------------------------------------------------------------------------

    def claimed(self, fence: int) -> None:
        """An aggregator took the database over."""
        if fence <= self._fence:
            self.violated("cloud", f"fencing token {fence} came after {self._fence}")
        self._fence = fence

    def cloud_restarted(self) -> None:
        """See `device_restarted`."""
        self._close_reader("cloud")
        self._last_update = 0

    def cloud_committed(self, path: Path, changes: frozenset[Change], fence: int = 0) -> None:
        """Reads what a commit left, if it was about replies or rounds.

        Args:
            fence: the token of who committed; 0 before it has claimed one.
        """
        if changes:
            self._check_fence(fence, f"committed {sorted(changes)}")
        tables = {table for _, table in changes}
        if ("UPDATE", "updates") in changes:
            self._last_update = 0
        if "updates" in tables or "rounds" in tables:
            self.read_cloud(path)
        if ("INSERT", "checkpoints") in changes:
            self.check_fold(path)

    def read_cloud(self, path: Path) -> None:
        """Compares the aggregator's replies with the books."""
        reader = self._reader("cloud", path)
        sql = (
            "SELECT rowid, update_id, order_id, round, device, kind, state, reason, body_sha256 FROM updates"
            " WHERE rowid > ? ORDER BY rowid"
        )
        is_whole, seen = self._last_update == 0, set()
        for row_id, update, *values in reader.execute(sql, (self._last_update,)).fetchall():
            self._last_update = row_id
            seen.add(update)
            self._note_cloud(update, CloudRow(*values))
        if is_whole:
            for update in self.in_cloud.keys() - seen:
                self.violated("cloud", f"the row of update {update} is gone")
        last = reader.execute("SELECT state FROM rounds ORDER BY number DESC LIMIT 1").fetchone()
        self.is_round_open = last is not None and last[0] not in ("done", "failed")

    def _note_cloud(self, update: str, row: CloudRow) -> None:
        before = self.in_cloud.get(update)
        if before == row:
            return
        if before is None:
            self._check_arrival(update, row)
        elif before.state != "stored":
            self.violated("cloud", f"update {update} was {before.state} and is {row.state}")
        self.in_cloud[update] = row

    def _check_arrival(self, update: str, row: CloudRow) -> None:
        if row.body_sha256 not in self._bodies.get(update, {}):
            self.violated("cloud", f"update {update} has a content that nobody made: altered")
        if row.device in self.revoked_devices:
            self.violated("cloud", f"update {update} came in from {row.device}, which is revoked")
        if self.made.get(update) != row.device:
            self.violated("cloud", f"update {update} came before it was in the outbox of {row.device}")
        if row.state == "stored":
            twins = [other for other, known in self.in_cloud.items() if known.order_id == row.order_id]
            if any(self.in_cloud[other].state in SOUND for other in twins):
                self.violated("cloud", f"two updates answer order {row.order_id}: doubled")

    def check_fold(self, path: Path) -> None:
        """Refolds the newest head, if it is another than the last that was refolded."""
        folded = Folded.read(self._reader("cloud", path))
        if folded is None or folded.round_number <= self._last_fold:
            return
        self._last_fold = folded.round_number
        replies = []
        for update in folded.updates:
            row = self.in_cloud[update]
            body = decode_body(self._bodies[update][row.body_sha256], Update)
            if (row.round_number, body.base_sha256.hex()) != (folded.round_number, folded.base_sha256):
                self.violated("cloud", f"update {update} was folded on another base or in another round")
            replies.append(body)
        self.moved += 1
        if complaint := self._fold_check.compare(folded, replies):
            self.violated("cloud", f"round {folded.round_number} is not the fold of its updates: {complaint}")

    def _check_fence(self, fence: int, what: str) -> None:
        if 0 < fence < self._fence:
            self.violated(
                "cloud", f"the aggregator of fencing token {fence} {what}, and {self._fence} is claimed"
            )

    def revoked(self, device: str) -> None:
        """The operator's word that a device is trusted no more is committed."""
        self.revoked_devices.add(device)

    def cloud_sent(self, packet: Packet, fence: int = 0) -> None:
        """A receipt says nothing that is not committed."""
        self._check_fence(fence, f"published {packet.topic}")
        if kind_of(packet) != "ak":
            return
        receipt = _receipt_in(packet.payload)
        update = receipt.update_id.hex()
        row = self.in_cloud.get(update)
        if receipt.verdict in ("stored", "duplicate") and (row is None or row.state not in SOUND):
            self.violated("cloud", f"a receipt says that update {update} is stored before it is")
        self.receipts[update].add(receipt.verdict)

    # ---- reading -----------------------------------------------------------------------------------------------

    def _reader(self, who: str, path: Path) -> sqlite3.Connection:
        if who not in self._readers:
            self._readers[who] = sqlite3.connect(path, isolation_level=None)
        return self._readers[who]

    def _close_reader(self, who: str) -> None:
        reader = self._readers.pop(who, None)
        if reader is not None:
            reader.close()

    def close(self) -> None:
        """Ends every reader."""
        for who in list(self._readers):
            self._close_reader(who)


def _receipt_in(message: bytes) -> Receipt:
    """The body of a receipt; who signed it is the devices' business."""
    end = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "big")
    head = message[_LENGTH_BYTES:end]
    content = read_content(read_sign1(head, limit_bytes=len(head)).payload)
    return decode_body(content[1], Receipt)
