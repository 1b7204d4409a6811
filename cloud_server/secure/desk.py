"""Performs the phases of a masked round: keys, shares, masked updates, unmasking. The rest is as in any round.

Laws of the file: only approved devices are members; what a phase decides is committed before the next phase's first
message leaves; no single update is ever decoded, weighed or measured here, and the strategy sees one reply, the mean.
Source: docs/protocol.md, clause 13; docs/architecture.md (Secure aggregation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import msgspec

from cloud_server.db import rounds as books
from cloud_server.rounds import events as ev
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.orders import order_message
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.state import MASK_STEPS, Collection, Phase, RoundState, Standing
from cloud_server.secure.book import MaskBook
from cloud_server.secure.layout import choose_layout
from cloud_server.secure.summed import ENVELOPE_BYTES, SummedPerformer, SummedReplies
from cloud_server.secure.unmask import unmask
from process.logs import get_logger
from wire.errors import MessageError, QuorumError, RoundError, StorageError
from wire.mask_terms import MaskTerms, RingName
from wire.masking import MaskGroup, Roster
from wire.messages import (
    MAX_BODY_BYTES,
    Body,
    MaskInbox,
    MaskKeys,
    MaskOpened,
    MaskQuestion,
    MaskRoster,
    MaskShares,
)
from wire.ring import RingVector, choose_ring, decode_mean, ring_of, ring_vector

_log = get_logger("cloud.secure")

_TERMS: Final = "masking"
_MEMBERS: Final = "members"
_BOOK: Final = "book"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingPorts:
    """What a masked run needs beyond what every run is lent.

    Attributes:
        tenant, fleet: of the devices.
        dropout: share of a cohort that a round must survive losing.
        colluding: share of a cohort that may tell the cloud all they know.
        update_key: a device's update key, 32 bytes.
        send: sends a message of a phase to a device, good until a deadline.
    """

    tenant: str
    fleet: str
    dropout: float
    colluding: float
    update_key: Callable[[str], bytes]
    send: Callable[[str, MaskRoster | MaskInbox | MaskQuestion, float], None]


class MaskedPerformer(SummedPerformer):
    """Drives a run by a strategy that sees means only, which devices unmask. Raises as `SummedPerformer`."""

    _terms: ClassVar = _TERMS
    _closed: ClassVar = "unmasking"
    _opening_state: ClassVar = "keys"
    _phases: ClassVar = {
        **SummedPerformer._phases,
        "keys": Phase.KEYS,
        "shares": Phase.SHARES,
        "unmasking": Phase.UNMASKING,
    }

    def __init__(self, plan: RunPlan, ports: RunPorts, intake: Intake, *, masking: MaskingPorts) -> None:
        super().__init__(plan, ports, intake)
        self._masking = masking
        self._book: MaskBook | None = None
        self._members: dict[str, books.OrderRow] = {}
        self._performers |= {
            ev.CloseKeys: self._close_keys,
            ev.CloseShares: self._close_shares,
            ev.AskForMasks: self._ask_for_masks,
        }

    # ---- opening -----------------------------------------------------------------------------------------------

    def _committed_terms(self, number: int, devices: Sequence[str]) -> dict[str, Any]:
        masking, plan = self._masking, self._plan
        try:
            roster = Roster.of([(device, masking.update_key(device)) for device in devices])
        except MessageError as error:
            raise QuorumError(str(error), present=len(devices)) from error
        layout = choose_layout(len(devices), masking.dropout, masking.colluding)
        ring = choose_ring(len(devices), plan.manifest.params_size, plan.train.clipping_norm)
        terms = MaskTerms(
            roster_sha256=roster.sha256,
            members=len(devices),
            degree=layout.degree,
            threshold=layout.threshold,
            ring=ring.name,
            value_bits=ring.value_bits,
            bound=ring.bound,
        )
        plain = msgspec.to_builtins(terms) | {"roster_sha256": roster.sha256.hex()}
        return {_TERMS: plain, _MEMBERS: [[device, key.hex()] for device, key in roster.members]}

    def _open_round(self, action: ev.OpenRound) -> ev.Event:
        event = super()._open_round(action)
        if isinstance(event, ev.RoundOpened):
            self._book = MaskBook(self._group(self._open_row()))
            self._wait_for_shares()
        return event

    def _group(self, row: books.RoundRow) -> MaskGroup:
        """The group that was committed with a round."""
        try:
            kept = dict(row.config[_TERMS])
            kept["roster_sha256"] = bytes.fromhex(kept["roster_sha256"])
            terms = msgspec.convert(kept, MaskTerms, builtin_types=(bytes,))
            roster = Roster.of([(device, bytes.fromhex(key)) for device, key in row.config[_MEMBERS]])
        except (KeyError, ValueError, TypeError, MessageError, msgspec.ValidationError) as error:
            raise StorageError(f"round {row.number} has no usable terms of masking") from error
        masking = self._masking
        return MaskGroup(masking.tenant, masking.fleet, self._plan.run, row.number, terms, roster)

    def _wait_for_shares(self) -> None:
        """Until it is decided who masks with whom, no update can be one of the round."""
        self._members = dict(self._orders)
        self._intake.open({}, set())

    # ---- what devices send -------------------------------------------------------------------------------------

    def take_masking(self, device: str, body: Body) -> ev.Event | None:
        """Takes what a phase asks for; what belongs to another phase is a straggler and says nothing."""
        book, state = self._book, self._round.state if self._round is not None else ""
        if book is None:
            return None
        if isinstance(body, MaskKeys) and state == "keys":
            book.add_keys(device, body)
        elif isinstance(body, MaskShares) and state == "shares":
            book.add_shares(device, body)
        elif isinstance(body, MaskOpened) and state == "unmasking":
            book.add_opened(device, body)
            if book.is_enough:
                return ev.MasksKnown()
        else:
            return None
        return ev.MaskAnswered(device)

    # ---- what devices are sent ---------------------------------------------------------------------------------

    def _send_orders(self, action: ev.SendOrders) -> None:
        if self._open_row().state in ("keys", "evaluating"):
            super()._send_orders(action)
            return
        for device in action.devices:
            self._send(self._orders[device])

    def _send(self, order: books.OrderRow) -> None:
        """What the present phase tells a device."""
        book, state, device = self._book, self._open_row().state, order.device
        if order.kind != "train" or book is None:
            super()._send(order)
        elif state == "keys":
            self._ports.outbox.send_order(device, self._masked_order(order, book.group.terms))
        elif state == "shares":
            self._masking.send(device, book.roster_for(device, order.order_id), order.deadline)
        elif state == "training":
            self._masking.send(device, book.inbox_for(device, order.order_id), order.deadline)
        elif state == "unmasking":
            # Asked after the round's deadline too: what was masked in time is worth unmasking.
            until = max(order.deadline, self._ports.clock.now()) + self._plan.policy.mask_seconds
            self._masking.send(device, book.question_for(device, order.order_id), until)

    def _masked_order(self, order: books.OrderRow, terms: MaskTerms) -> Any:
        payload = self._plan.manifest.params_size * ring_of(terms).dtype.itemsize
        slot_bytes = min(MAX_BODY_BYTES, int(1.2 * payload) + ENVELOPE_BYTES)
        message = order_message(self._plan, order, self._train())
        return msgspec.structs.replace(message, masking=terms, slot_bytes=slot_bytes)

    # ---- the turns of the round --------------------------------------------------------------------------------

    def _close_keys(self, _action: ev.CloseKeys) -> ev.Event:
        book = self._known_book()
        return self._turn("shares", book.close_keys(), self._until())

    def _close_shares(self, _action: ev.CloseShares) -> ev.Event:
        book = self._known_book()
        sharers = book.close_shares()
        event = self._turn("training", sharers, self._open_row().deadline)
        self._listen([self._members[device] for device in sorted(sharers)], set())
        return event

    def _ask_for_masks(self, _action: ev.AskForMasks) -> ev.Event:
        """`CloseCollection` has committed whose updates count."""
        return ev.MaskPhaseOpened(tuple(sorted(self._known_book().delivered)), self._until())

    def _until(self) -> float:
        return self._ports.clock.now() + self._plan.policy.mask_seconds

    def _turn(self, state: str, devices: frozenset[str], deadline: float) -> ev.MaskPhaseOpened:
        """Commits the book with the phase that it leads to."""
        row, run = self._open_row(), self._plan.run
        key = self._ports.blobs.put_blob(self._known_book().to_bytes())
        outdated = row.config.get(_BOOK)
        config = {**row.config, _BOOK: key}
        with self._database.transaction(fence=self._ports.fence) as connection:
            books.update_round(connection, run, row.number, state=state, config=config)
        self._round = replace(row, state=state, config=config)
        if outdated:
            self._forget([outdated])
        _log.info("mask_phase", run=run, round=row.number, phase=state, devices=len(devices))
        return ev.MaskPhaseOpened(tuple(sorted(devices)), deadline)

    def _closed_with(self, stored: Sequence[books.UpdateRow]) -> None:
        self._known_book().close_updates(each.device for each in stored)

    def _known_book(self) -> MaskBook:
        if self._book is None:
            raise RoundError("the round is not a masked one")
        return self._book

    def _end_round(self) -> None:
        kept = self._round.config.get(_BOOK) if self._round is not None else None
        super()._end_round()
        self._book, self._members = None, {}
        if kept:
            self._forget([kept])

    # ---- the fold ----------------------------------------------------------------------------------------------

    def _stored_replies(self, row: books.RoundRow) -> SummedReplies:  # type: ignore[override]
        """One reply: the mean of all masked updates."""
        book = self._known_book()
        ring, size = ring_of(book.group.terms), self._plan.manifest.params_size
        total = unmask(book, self._masked_updates(row, size), ring, size)
        count = len(book.delivered)
        return SummedReplies(decode_mean(total, ring, count), count)

    def _masked_updates(self, row: books.RoundRow, size: int) -> Iterator[tuple[str, RingVector]]:
        ring = ring_of(self._known_book().group.terms)
        for each, update in self._stored_updates(row.number):
            yield each.device, ring_vector(update.payload, ring, size)

    def _ring(self) -> RingName | None:
        return None if self._book is None else self._book.group.terms.ring

    # ---- after a restart ---------------------------------------------------------------------------------------

    def _restore_collection(self, row: books.RoundRow, kind: str, state: RoundState) -> RoundState:
        if kind != "train" or _TERMS not in row.config:
            return super()._restore_collection(row, kind, state)
        self._book = book = MaskBook(self._group(row))
        if _BOOK in row.config:
            book.read(self._ports.blobs.get_blob(row.config[_BOOK]))
        state = super()._restore_collection(row, kind, state)
        self._members = dict(self._orders)
        asked = self._asked(row, book)
        standings = {device: state.cohort.members[device] for device in sorted(asked)}
        if state.phase in MASK_STEPS:
            self._intake.open({}, set())
            standings = dict.fromkeys(standings, Standing.WAITING)
        return replace(state, cohort=Collection.of(standings))

    def _asked(self, row: books.RoundRow, book: MaskBook) -> frozenset[str]:
        """Who the present phase waits for."""
        if row.state == "keys":
            return frozenset(self._members)
        if row.state == "shares":
            return book.close_keys()
        if row.state == "training":
            return book.sharers
        with self._database.read() as connection:
            stored = books.load_updates(connection, self._plan.run, row.number, "train")
        return book.close_updates(each.device for each in stored)
