"""Replies come in: screened, committed, and only then acknowledged.

Laws of the file: one transaction holds the reply's row, the sender's replay window and its strike; a receipt is
returned only after it committed; an id that has a row is answered from the row, whatever comes with it
(once, and never counted twice, nor struck twice). A device in quarantine is heard and not counted; nothing of one that
is revoked is booked once that is committed. Source:
DESIGN.md, laws 3 and 6; docs/protocol.md, clause 9.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cloud_server.db import rounds as books
from cloud_server.db.carried import TOO_STALE, load_past_order
from cloud_server.db.devices import QUARANTINED, REVOKED, hold_status, load_status
from cloud_server.db.durability import Promise, newest_promise, number_update
from cloud_server.db.engine import Connection, Database
from cloud_server.rounds.events import Event, ReplyRefused, ReplyStored
from cloud_server.rounds.given import GivenReceipts
from cloud_server.rounds.kept import KeptUpdates
from cloud_server.rounds.ports import Blobs
from cloud_server.screening import (
    LATE,
    Expected,
    Refusal,
    Screened,
    screen_evaluation,
    screen_masked,
    screen_update,
)
from cloud_server.strikes import STRIKING, StrikePolicy, Struck, strike
from process.clock import Clock
from process.logs import get_logger
from wire.errors import MessageError, ReplayError
from wire.header import Header
from wire.mask_terms import RING_BYTES
from wire.messages import Evaluation, Receipt, Update, decode_body

INLINE_BYTES = 256 * 1024
"""Bodies above this lie in the artefact store instead of the database row."""

_NO_ID = bytes(16)
_STORED = frozenset({"stored", "duplicate"})
_log = get_logger("cloud.rounds")


@dataclass(frozen=True, slots=True)
class Arrival:
    """One opened message of a device, and what is known of it beside its body."""

    device: str
    header: Header
    body: bytes
    transfer_sha256: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Looked:
    """An arrival and what screening says of it; `reply` None for bytes that are none, `blob` of a large one."""

    arrival: Arrival
    reply: Update | Evaluation | None
    screened: Screened | int | Refusal
    blob: str


Taken = tuple[Receipt, Event | None]
Conclusion = Callable[[], Taken]
"""What a reply comes to once its transaction has committed."""


class Intake:
    """Takes the replies of one run. `open` names what is asked for now; everything else is late or
    unknown.

    Attributes:
        given: the receipts that it gave lately.
        kept: updates that were committed in the collection that was opened last, decoded.
        unbooked_total: refused messages that have no row in the books, by reason, since the start.
        strikes_total: strikes by reason, since the start.
        quarantined_total: devices that were put into quarantine by them, since the start.
    """

    def __init__(
        self,
        database: Database,
        fence: int | None,
        blobs: Blobs,
        run: str,
        clock: Clock,
        policy: StrikePolicy | None = None,
    ) -> None:
        self._database = database
        self._fence = fence
        self._blobs = blobs
        self._run = run
        self._clock = clock
        self._policy = policy or StrikePolicy()
        self._expected: Mapping[bytes, Expected] = {}
        self._members: Mapping[str, Expected] = {}
        self._answered: set[bytes] = set()
        self._carried: dict[bytes, Expected] = {}
        self._carried_into = 0
        self.kept = KeptUpdates()
        self.given = GivenReceipts()
        self.unbooked_total: Counter[str] = Counter()
        self.strikes_total: Counter[str] = Counter()
        self.quarantined_total = 0

    def open(self, expected: Mapping[bytes, Expected], answered: set[bytes]) -> None:
        """Begins a collection: what each order asks for, and the orders that have their reply already."""
        self._expected = expected
        self._answered = answered
        self._meet_members()
        self.kept.clear()

    def carry(self, expected: Mapping[bytes, Expected], round_number: int) -> None:
        """Takes updates of earlier rounds' orders, too, whether or not something is collected now.

        Args:
            round_number: that they count in.
        """
        self._carried, self._carried_into = dict(expected), round_number
        self._meet_members()

    def close(self) -> None:
        """Ends the collection; what it kept is for its fold."""
        self._expected, self._answered = {}, set()
        self._meet_members()

    def take(self, arrivals: Sequence[Arrival]) -> list[Taken]:
        """Screens replies and stores them together: one commit, however many they are.

        Returns:
            For each the receipt to send, and what it means for the round (None: nothing).

        Raises:
            StorageError: (disk) nothing was committed; no receipt may be sent, the devices will try again.
        """
        looked_at = [self._look_at(arrival) for arrival in arrivals]
        answered: set[bytes] = set()
        with self._database.transaction(fence=self._fence) as connection:
            conclusions = [self._book_if_trusted(connection, each, answered) for each in looked_at]
        taken = [conclude() for conclude in conclusions]
        for arrival, (receipt, _) in zip(arrivals, taken, strict=True):
            if receipt.verdict in _STORED:
                self.given.note(arrival.device, arrival.transfer_sha256, receipt.update_id)
        return taken

    def answer_again(self, repeated: Sequence[tuple[str, bytes]]) -> list[tuple[str, Receipt]]:
        """Receipts for transfers that came again, each of (device, transfer digest) that has one in `given`.

        Each promises what a receipt promises now; nothing of one that was revoked, or shut out, meanwhile is
        answered: it goes the long way, if it may.

        Raises:
            StorageError: (disk) the books cannot be read; the devices will try again.
        """
        if not repeated:
            return []
        with self._database.read() as connection:
            promise = newest_promise(connection)
            trusted = {
                device for device, _ in repeated if load_status(connection, device) not in ("", REVOKED)
            }
        found = []
        for device, transfer in repeated:
            update_id = self.given.find(device, transfer)
            if update_id is not None and device in trusted:
                receipt = Receipt(
                    update_id=update_id,
                    transfer=transfer,
                    verdict="duplicate",
                    row=promise.row,
                    durable=promise.durable,
                )
                found.append((device, receipt))
        return found

    def _look_at(self, arrival: Arrival) -> _Looked:
        """Before the transaction: all that takes long."""
        try:
            reply = _decoded(arrival)
        except MessageError:
            return _Looked(arrival, None, Refusal.MALFORMED, "")
        screened = self._screen(reply, arrival)
        blob = "" if isinstance(screened, Refusal) else self._keep_large(arrival.body)
        return _Looked(arrival, reply, screened, blob)

    def _book_if_trusted(self, connection: Connection, looked: _Looked, answered: set[bytes]) -> Conclusion:
        """In the transaction, for between the message and it somebody may have ended the trust in its sender."""
        arrival, reply = looked.arrival, looked.reply
        status = hold_status(connection, arrival.device)
        if status == REVOKED:
            update_id = _NO_ID if reply is None else reply.update_id
            return lambda: (self._unbooked(update_id, arrival, Refusal.REVOKED), None)
        if reply is None:
            return self._book_malformed(connection, arrival)
        return self._book(connection, arrival, reply, looked, answered, status)

    def _book(
        self,
        connection: Connection,
        arrival: Arrival,
        reply: Update | Evaluation,
        looked: _Looked,
        answered: set[bytes],
        status: str,
    ) -> Conclusion:
        """In the transaction; what it returns is called after the commit.

        Args:
            status: of the sender.
            answered: orders that were answered in this transaction, which is not over.
        """
        known = books.load_update(connection, reply.update_id)
        if known is not None:
            receipt = _receipt_again(known, arrival, newest_promise(connection))
            return lambda: (receipt, None)
        try:
            is_fresh = self._move_window(connection, arrival)
        except ReplayError:
            return lambda: (self._unbooked(reply.update_id, arrival, Refusal.REPLAYED), None)
        outcome = (
            Refusal.QUARANTINED
            if status == QUARANTINED
            else self._outcome(connection, arrival, reply, looked, answered)
        )
        is_booked = self._is_booked(connection, reply, arrival.device, outcome)
        promise = Promise() if isinstance(outcome, Refusal) else number_update(connection)
        if is_booked:
            self._insert(connection, reply, arrival, outcome, looked.blob, _norm_of(looked.screened))
        struck: Struck | None = None
        if not isinstance(outcome, Refusal):
            answered.add(reply.order_id)
        elif self._asked(reply.order_id) is not None and (is_booked or is_fresh):
            struck = self._strike(connection, arrival.device, outcome)
        return lambda: self._concluded(reply, looked, outcome, promise, struck, is_booked=is_booked)

    def _outcome(
        self,
        connection: Connection,
        arrival: Arrival,
        reply: Update | Evaluation,
        looked: _Looked,
        answered: set[bytes],
    ) -> int | Refusal:
        """What the books make of what screening said."""
        screened = looked.screened
        if screened is Refusal.UNKNOWN_ORDER:
            return self._past_order(connection, reply, arrival.device)
        if not isinstance(screened, Refusal) and reply.order_id in answered:
            return Refusal.ALREADY_ANSWERED
        return screened.num_examples if isinstance(screened, Screened) else screened

    def _asked(self, order_id: bytes) -> Expected | None:
        """What an order asked for that may be answered now."""
        return self._expected.get(order_id) or self._carried.get(order_id)

    def _meet_members(self) -> None:
        asked = (*self._carried.values(), *self._expected.values())
        self._members = {each.device: each for each in asked}

    def _book_malformed(self, connection: Connection, arrival: Arrival) -> Conclusion:
        """Signed bytes that are no reply: refused without a row, since they name no id.

        Whose they are and what they answer stands in the signed header; the window sees to it that the same message
        is not held against a device twice.
        """
        device, header = arrival.device, arrival.header
        expected = self._members.get(device)
        answers = None if expected is None else (expected.run, expected.round_number)
        is_open = answers == (header.run, header.round_number)
        try:
            is_fresh = self._move_window(connection, arrival)
        except ReplayError:
            is_fresh = False
        is_held_against = is_open and is_fresh
        struck = self._strike(connection, device, Refusal.MALFORMED) if is_held_against else None

        def conclude() -> Taken:
            self._note_strike(device, Refusal.MALFORMED, struck)
            receipt = self._unbooked(_NO_ID, arrival, Refusal.MALFORMED)
            return receipt, ReplyRefused(device) if is_held_against else None

        return conclude

    def _strike(self, connection: Connection, device: str, refusal: Refusal) -> Struck | None:
        """Holds a refusal against its sender, if it is of the kind."""
        if refusal not in STRIKING:
            return None
        return strike(connection, device, refusal, now=self._clock.now(), policy=self._policy)

    def _note_strike(self, device: str, refusal: Refusal, struck: Struck | None) -> None:
        """After the commit."""
        if struck is None:
            return
        self.strikes_total[str(refusal)] += 1
        _log.warning("device_struck", device=device, reason=str(refusal), strikes=struck.strikes)
        if struck.is_quarantined:
            self.quarantined_total += 1
            _log.warning("device_quarantined", device=device, reason=str(refusal), strikes=struck.strikes)

    def _unbooked(self, update_id: bytes, arrival: Arrival, refusal: Refusal) -> Receipt:
        self.unbooked_total[str(refusal)] += 1
        return _receipt(update_id, arrival, refusal)

    def _screen(self, reply: Update | Evaluation, arrival: Arrival) -> Screened | int | Refusal:
        """A sound update, the weight of a sound evaluation, or why a reply is refused."""
        if len(arrival.body) > INLINE_BYTES and self._is_shut_out(arrival.device):
            return Refusal.QUARANTINED  # before its bytes are put into the store
        expected = self._asked(reply.order_id)
        if expected is None:
            return Refusal.UNKNOWN_ORDER
        if arrival.header.schema not in (b"", expected.graphs_sha256):
            return Refusal.WRONG_MODEL
        outcome: Screened | int | Refusal
        if isinstance(reply, Update) and reply.codec in RING_BYTES:
            outcome = screen_masked(reply, arrival.device, expected)
        elif isinstance(reply, Update):
            outcome = screen_update(reply, arrival.device, expected)
        else:
            outcome = screen_evaluation(reply, arrival.device, expected)
        if not isinstance(outcome, Refusal) and reply.order_id in self._answered:
            return Refusal.ALREADY_ANSWERED
        return outcome

    def _is_booked(
        self, connection: Connection, reply: Update | Evaluation, device: str, outcome: int | Refusal
    ) -> bool:
        """Whether a reply gets a row: what is stored, and what is refused of a device's answer to an order of its own.

        All else could never count, a hostile device may say it without end, and its row would take the id from the
        device whose it is.
        """
        if outcome in (Refusal.UNKNOWN_ORDER, Refusal.FOREIGN_ORDER):
            return False
        if outcome is Refusal.QUARANTINED:
            expected = self._asked(reply.order_id)
            return expected is not None and expected.device == device
        if outcome in LATE:
            return not books.has_reply(connection, reply.order_id, device)
        return True

    def _is_shut_out(self, device: str) -> bool:
        with self._database.read() as connection:
            return load_status(connection, device) in (QUARANTINED, REVOKED)

    def _move_window(self, connection: Connection, arrival: Arrival) -> bool:
        """Lets (epoch, seq) in once; False for one behind the window, of which only an id can tell whether it is new.

        Raises:
            ReplayError: (peer) it was seen.
        """
        header = arrival.header
        window = books.load_window(connection, arrival.device, header.type)
        try:
            window = window.accept(header.epoch, header.seq)
        except ReplayError as error:
            if error.facts.get("reason") != "behind":
                raise
            return False
        books.save_window(connection, arrival.device, header.type, window)
        return True

    def _past_order(self, connection: Connection, reply: Update | Evaluation, device: str) -> Refusal:
        found = load_past_order(connection, reply.order_id)
        if found is None:
            return Refusal.UNKNOWN_ORDER
        owner, reason = found
        if owner != device:
            return Refusal.FOREIGN_ORDER
        return Refusal.TOO_STALE if reason == TOO_STALE else Refusal.ROUND_CLOSED

    def _insert(
        self,
        connection: Connection,
        reply: Update | Evaluation,
        arrival: Arrival,
        outcome: int | Refusal,
        blob: str,
        norm: float,
    ) -> None:
        now = self._clock.now()
        is_refused = isinstance(outcome, Refusal)
        state = ("late" if outcome in LATE else "refused") if is_refused else "stored"
        is_told = not is_refused and self._keeps_metrics(reply.order_id)
        row = books.UpdateRow(
            update_id=reply.update_id,
            order_id=reply.order_id,
            round_number=self._carried_into if reply.order_id in self._carried else reply.round_number,
            device=arrival.device,
            kind="train" if isinstance(reply, Update) else "evaluate",
            state=state,
            num_examples=0 if isinstance(outcome, Refusal) else outcome,
            codec=reply.codec if isinstance(reply, Update) else "",
            metrics=reply.metrics if is_told else {},
            body=b"" if is_refused or blob else arrival.body,
            artefact_key="" if is_refused else blob,
            body_sha256=hashlib.sha256(arrival.body).digest(),
            transfer_sha256=arrival.transfer_sha256,
            size_bytes=arrival.size_bytes,
            reason=str(outcome) if is_refused else "",
            received_at=now,
            norm=norm if is_told else 0.0,
        )
        books.insert_update(connection, self._run, row)
        if not is_refused:
            books.set_order_state(connection, reply.order_id, "answered", now)

    def _keeps_metrics(self, order_id: bytes) -> bool:
        expected = self._asked(order_id)
        return expected is None or expected.keeps_metrics

    def _concluded(
        self,
        reply: Update | Evaluation,
        looked: _Looked,
        outcome: int | Refusal,
        promise: Promise,
        struck: Struck | None,
        *,
        is_booked: bool,
    ) -> Taken:
        """After the commit."""
        arrival, order_id = looked.arrival, reply.order_id
        if not is_booked:
            self.unbooked_total[str(outcome)] += 1
        if isinstance(outcome, Refusal):
            self._note_strike(arrival.device, outcome, struck)
            expected = self._asked(order_id)
            is_of_member = expected is not None and expected.device == arrival.device
            event = ReplyRefused(arrival.device) if is_of_member else None
            return _receipt(reply.update_id, arrival, outcome), event
        if isinstance(looked.screened, Screened) and order_id in self._expected:
            # One that is carried is clipped by the bound of the round that folds it, which may not be open yet.
            self.kept.put(reply.update_id, looked.screened)
        self._answered.add(order_id)
        self._carried.pop(order_id, None)
        return _receipt(reply.update_id, arrival, None, promise), ReplyStored(arrival.device)

    def _keep_large(self, body: bytes) -> str:
        """Before the transaction: a blob without a row is harmless, a row without its blob is not."""
        return self._blobs.put_blob(body) if len(body) > INLINE_BYTES else ""


def _decoded(arrival: Arrival) -> Update | Evaluation:
    if arrival.header.type == Update.TYPE:
        return decode_body(arrival.body, Update)
    return decode_body(arrival.body, Evaluation)


def _norm_of(screened: Screened | int | Refusal) -> float:
    return screened.norm if isinstance(screened, Screened) else 0.0


def _receipt(
    update_id: bytes, arrival: Arrival, refusal: Refusal | None, promise: Promise | None = None
) -> Receipt:
    promise = promise or Promise()
    return Receipt(
        update_id=update_id,
        transfer=arrival.transfer_sha256,
        verdict="stored" if refusal is None else "refused",
        reason=str(refusal or ""),
        row=promise.row,
        durable=promise.durable,
    )


def _receipt_again(known: books.UpdateRow, arrival: Arrival, promise: Promise) -> Receipt:
    """The answer of record. Another device's id is refused: ids are random, so nobody has it by chance."""
    if known.device != arrival.device:
        return _receipt(known.update_id, arrival, Refusal.FOREIGN_UPDATE)
    if known.state in ("refused", "late"):
        return _receipt(known.update_id, arrival, Refusal(known.reason))
    return Receipt(
        update_id=known.update_id,
        transfer=arrival.transfer_sha256,
        verdict="duplicate",
        row=promise.row,
        durable=promise.durable,
    )
