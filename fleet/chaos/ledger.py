"""What must be true of every update, whatever happens: books of its own, kept beside the product's.

Laws of the file: nothing here asks an object or a counter of the product; what is known comes from what devices trained
(by content), from the rows that lie on the disks after each commit, read by a connection of the ledger's own, and from
the packets and signed files that left; the first thing that is not as it must be ends the history. Sources: DESIGN.md,
laws 2, 3 and 5; docs/architecture.md, "The simulation under faults".
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from edge_agent.rounds.masked_rounds import Draft
from edge_agent.settings import StorageSettings
from edge_agent.store.outbox import ENDED_ROWS_KEPT
from fleet.chaos.fold_check import FoldCheck, Folded, Made
from fleet.chaos.heads import Heads
from fleet.chaos.model_ledger import ModelLedger
from fleet.chaos.network import kind_of
from fleet.chaos.privacy_ledger import PrivacyLedger
from fleet.chaos.rows import ENDED, NEAR_ROUNDS, OPEN_BYTES, REPLIES, SOUND, CloudRow, receipt_in
from fleet.chaos.sqlite import Change
from fleet.chaos.violation import Violation, ViolationError
from wire import envelope
from wire.chunks import parse
from wire.messages import Evaluation, Update, decode_body, encode_body
from wire.transport import Packet

_PRIVATE_TABLES = {"rounds", "privacy_ledger", "privacy_secrets"}


class Ledger:
    """The books of one history.

    Args:
        now: virtual seconds.
        device_now: what a device goes by when it lets an update expire (unix seconds).
        fold_check: refolds every aggregate.
        caps: what a device may use of its disk.
        privacy: of a run with noise.
        heads: of the run.
        refused: the releases that failed on a device, by its own disk.
    """

    def __init__(
        self,
        now: Callable[[], float],
        device_now: Callable[[str], float],
        fold_check: FoldCheck,
        caps: StorageSettings,
        privacy: PrivacyLedger | None = None,
        heads: Heads | None = None,
        refused: Callable[[str], frozenset[str]] = lambda device: frozenset(),
    ) -> None:
        self._heads = heads or Heads()
        self._caps = caps
        self._now = now
        self._device_now = device_now
        self._fold_check = fold_check
        self._bodies: dict[str, dict[str, bytes]] = defaultdict(dict)
        self._drafts: dict[str, Draft] = {}
        self.models = ModelLedger(self.violated, refused)
        self.privacy = privacy
        self.made: dict[str, str] = {}
        self.on_device: dict[str, str] = {}
        self._of_device: dict[str, list[str]] = defaultdict(list)
        self._open: dict[str, set[str]] = defaultdict(set)
        self.in_cloud: dict[str, CloudRow] = {}
        self._answers: dict[str, list[str]] = defaultdict(list)
        self.receipts: dict[str, set[str]] = defaultdict(set)
        self.rotten: set[str] = set()
        self.revoked_devices: set[str] = set()
        self.moved = 0
        self.violations: list[Violation] = []
        self.is_round_open = False
        self._readers: dict[str, sqlite3.Connection] = {}
        self._first_open: Counter[str] = Counter()
        self._numbers: dict[tuple[str, str, int, int], bytes] = {}
        self._last_update = 0
        self._last_fold = 0
        self._fence = 0

    # ---- what it all comes to ----------------------------------------------------------------------------------

    @property
    def is_in_flight(self) -> bool:
        """Whether there is work that a fault could harm."""
        return self.is_round_open or any(self._open.values())

    @property
    def open_ids(self) -> set[str]:
        """Updates that devices owe, but for those whose device is revoked: nobody takes them any more."""
        held = [updates for device, updates in self._open.items() if device not in self.revoked_devices]
        return set[str]().union(*held)

    def violated(self, who: str, what: str) -> NoReturn:
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

    def masked(self, device: str, draft: Draft, body: Update) -> None:
        """A device has put an update under its masks."""
        if body.payload == draft.values.tobytes():
            self.violated(device, f"update {body.update_id.hex()} is to leave without its masks")
        self.trained(body)
        self._drafts[hashlib.sha256(encode_body(body)).hexdigest()] = draft

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
        return bool(self._open[device])

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
        for update in sorted(self._open[device] - seen):
            self.violated(device, f"update {update} is gone from the outbox: lost")
        if is_whole:
            for update in self._of_device[device]:
                if update not in seen:
                    end = self.on_device[update]
                    self.violated(device, f"the end of update {update} ({end}) is gone: lost")

    def _check_room(self, device: str, path: Path) -> None:
        (held,) = self._reader(device, path).execute(OPEN_BYTES).fetchone()
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
            self._of_device[device].append(update)
        self.on_device[update] = state
        if state == "open":
            self._open[device].add(update)
        else:
            self._open[device].discard(update)
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

    # ---- the aggregator ----------------------------------------------------------------------------------------

    def written(self, key: str, data: bytes, fence: int = 0) -> None:
        """A file was written to the store, signed ones among them."""
        self._check_fence(fence, f"signed or wrote {key}")
        self.models.written(key, data)

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
        if ("UPDATE", "devices") in changes:
            self._read_revoked(path)
        if self.privacy is not None and tables & _PRIVATE_TABLES:
            self.privacy.read(self._reader("cloud", path))
        if "updates" in tables or "rounds" in tables:
            self.read_cloud(path, NEAR_ROUNDS if ("UPDATE", "updates") in changes else 0)
        if ("INSERT", "checkpoints") in changes:
            self.check_fold(path)

    def read_cloud(self, path: Path, rounds: int = NEAR_ROUNDS) -> None:
        """Compares the aggregator's replies with the books: all of them after a start, else those of late.

        Args:
            rounds: of so many newest rounds the rows are read again.
        """
        reader, is_whole, seen = self._reader("cloud", path), self._last_update == 0, set()
        last = reader.execute("SELECT number, state FROM rounds ORDER BY number DESC LIMIT 1").fetchone()
        self.is_round_open = last is not None and last[1] not in ("done", "failed")
        oldest = last[0] - rounds if last is not None and rounds and not is_whole else 2**62
        rows = reader.execute(REPLIES, (self._last_update, oldest)).fetchall()
        for row_id, update, *values in rows:
            self._last_update = max(self._last_update, row_id)
            seen.add(update)
            self._note_cloud(update, CloudRow(*values))
        if is_whole:
            for update in self.in_cloud.keys() - seen:
                self.violated("cloud", f"the row of update {update} is gone")
            self._read_revoked(path)
            if self.privacy is not None:
                self.privacy.read(reader, is_whole=True)

    def _read_revoked(self, path: Path) -> None:
        """Whom the operator trusts no more, as it is committed."""
        rows = self._reader("cloud", path).execute("SELECT device FROM devices WHERE status = 'revoked'")
        revoked = {device for (device,) in rows}
        for device in self.revoked_devices - revoked:
            self.violated("cloud", f"{device} was revoked, and is trusted again")
        self.revoked_devices = revoked

    def _note_cloud(self, update: str, row: CloudRow) -> None:
        before = self.in_cloud.get(update)
        if before == row:
            return
        if before is None:
            self._check_arrival(update, row)
            self._answers[row.order_id].append(update)
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
        if row.state == "late" and not row.reason:
            self.violated("cloud", f"update {update} came late, and nobody says why")
        if row.reason == "too_stale":
            body = decode_body(self._bodies[update][row.body_sha256], Update)
            if not self._heads.too_stale(body.base_sha256.hex()):
                self.violated("cloud", f"update {update} was refused as too stale, and is not: lost")
        twins = [self.in_cloud[other] for other in self._answers[row.order_id]]
        if row.state == "stored" and any(twin.state in SOUND for twin in twins):
            self.violated("cloud", f"two updates answer order {row.order_id}: doubled")

    def check_fold(self, path: Path) -> None:
        """Refolds the newest head, if it is another than the last that was refolded."""
        folded = Folded.read(self._reader("cloud", path))
        if folded is None or folded.round_number <= self._last_fold:
            return
        self._last_fold = folded.round_number
        if complaint := self._heads.moved(folded.base_sha256, folded.head_sha256):
            self.violated("cloud", f"the head of round {folded.round_number} {complaint}")
        if len(set(folded.node_ids)) < len(folded.node_ids):
            self.violated("cloud", f"a device has two voices in round {folded.round_number}: doubled")
        replies = [
            self._counted(folded, update, node_id)
            for update, node_id in zip(folded.updates, folded.node_ids, strict=True)
        ]
        self.moved += 1
        if complaint := self._fold_check.compare(folded, replies):
            self.violated("cloud", f"round {folded.round_number} is not the fold of its updates: {complaint}")

    def _counted(self, folded: Folded, update: str, node_id: int) -> Made:
        """An update in an aggregate, if it may be there."""
        row = self.in_cloud[update]
        body = decode_body(self._bodies[update][row.body_sha256], Update)
        number, base = folded.round_number, folded.base_sha256
        age, complaint = self._heads.counted(update, body.base_sha256.hex(), base, number)
        if row.round_number != folded.collected_in:
            complaint = f"update {update} is of round {row.round_number} and counts in {number}"
        if complaint:
            self.violated("cloud", complaint)
        return Made(body, node_id, self._drafts.get(row.body_sha256), age)

    def _check_fence(self, fence: int, what: str) -> None:
        if 0 < fence < self._fence:
            self.violated(
                "cloud", f"the aggregator of fencing token {fence} {what}, and {self._fence} is claimed"
            )

    def cloud_sent(self, packet: Packet, fence: int = 0) -> None:
        """A receipt says nothing that is not committed."""
        self._check_fence(fence, f"published {packet.topic}")
        if kind_of(packet) != "ak":
            return
        receipt = receipt_in(packet.payload)
        update = receipt.update_id.hex()
        row = self.in_cloud.get(update)
        if receipt.verdict in ("stored", "duplicate") and (row is None or row.state not in SOUND):
            self.violated("cloud", f"a receipt says that update {update} is stored before it is")
        self.receipts[update].add(receipt.verdict)

    # ---- reading -----------------------------------------------------------------------------------------------

    def _reader(self, who: str, path: Path) -> sqlite3.Connection:
        if who not in self._readers:
            self._readers[who] = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        return self._readers[who]

    def _close_reader(self, who: str) -> None:
        reader = self._readers.pop(who, None)
        if reader is not None:
            reader.close()

    def close(self) -> None:
        """Ends every reader."""
        for who in list(self._readers):
            self._close_reader(who)
