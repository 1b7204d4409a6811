"""Performs the phases of a masked round: keys, shares, masked updates, unmasking. The rest is as in any round.

Laws of the file: only approved devices are members; what a phase decides is committed before the next phase's first
message leaves; no single update is ever decoded, weighed or measured here, and the strategy sees one reply, the mean.
Source: docs/protocol.md, clause 13; docs/architecture.md (Secure aggregation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import msgspec
import numpy as np

from cloud_server.db import rounds as books
from cloud_server.rounds import events as ev
from cloud_server.rounds.draws import draw_bytes
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.orders import order_message
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.state import MASK_STEPS, Collection, Phase, RoundState, Standing
from cloud_server.secure.book import MaskBook
from cloud_server.secure.groups import MAX_MESSAGE_BYTES, Group, GroupBooks, split_cohort
from cloud_server.secure.summed import ENVELOPE_BYTES, SummedPerformer, SummedReplies
from cloud_server.secure.unmask import unmask
from process.logs import get_logger
from wire.errors import MessageError, QuorumError, RoundError, StorageError
from wire.mask_terms import MaskTerms, NoiseTerms, RingName
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
from wire.ring import Ring, RingVector, ring_of, ring_vector

_log = get_logger("cloud.secure")

_TERMS: Final = "mask_groups"
_BOOK: Final = "book"
NOT_UNMASKED: Final = "not_unmasked"
_PHASE_OF: Final[dict[type, str]] = {MaskKeys: "keys", MaskShares: "shares", MaskOpened: "unmasking"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingPorts:
    """What a masked run needs beyond what every run is lent.

    Attributes:
        tenant, fleet: of the devices.
        dropout: share of a cohort that a round must survive losing.
        colluding: share of a cohort that may tell the cloud all they know.
        update_key: a device's update key, 32 bytes.
        send: sends a message of a phase to a device, good until a deadline.
        message_bytes: the largest message that the broker carries; more devices than that allows mask in groups.
    """

    tenant: str
    fleet: str
    dropout: float
    colluding: float
    update_key: Callable[[str], bytes]
    send: Callable[[str, MaskRoster | MaskInbox | MaskQuestion, float], None]
    message_bytes: int = MAX_MESSAGE_BYTES


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
        self._book: GroupBooks | None = None
        self._members: dict[str, books.OrderRow] = {}
        self._asked_for_masks: frozenset[str] = frozenset()
        self._performers |= {
            ev.CloseKeys: self._close_keys,
            ev.CloseShares: self._close_shares,
            ev.AskForMasks: self._ask_for_masks,
        }

    # ---- opening -----------------------------------------------------------------------------------------------

    def _committed_terms(self, number: int, devices: Sequence[str]) -> dict[str, Any]:
        masking, plan = self._masking, self._plan
        seed = draw_bytes(self._seed, "mask groups", number)
        groups = split_cohort(
            devices,
            seed,
            dropout=masking.dropout,
            colluding=masking.colluding,
            message_bytes=masking.message_bytes,
        )
        largest = max(len(group.devices) for group in groups)
        ring, _ = self._terms_of_sum(largest)
        if len(groups) > 1:
            _log.info("masked_in_groups", run=plan.run, round=number, groups=len(groups), largest=largest)
        return {_TERMS: [self._kept_group(group, ring) for group in groups]}

    def _terms_of_sum(self, members: int) -> tuple[Ring, NoiseTerms | None]:
        masking = self._masking
        return self._terms_for(members, dropout=masking.dropout, colluding=masking.colluding)

    def _kept_group(self, group: Group, ring: Ring) -> dict[str, Any]:
        try:
            roster = Roster.of([(device, self._masking.update_key(device)) for device in group.devices])
        except MessageError as error:
            raise QuorumError(str(error), present=len(group.devices)) from error
        terms = MaskTerms(
            roster_sha256=roster.sha256,
            members=len(roster.members),
            degree=group.layout.degree,
            threshold=group.layout.threshold,
            ring=ring.name,
            value_bits=ring.value_bits,
            bound=ring.bound,
            # Each group's sum is told by itself, and needs noise enough of its own.
            noise=self._terms_of_sum(len(roster.members))[1],
        )
        plain = msgspec.to_builtins(terms) | {"roster_sha256": roster.sha256.hex()}
        return {"terms": plain, "members": [[device, key.hex()] for device, key in roster.members]}

    def _open_round(self, action: ev.OpenRound) -> ev.Event:
        event = super()._open_round(action)
        if isinstance(event, ev.RoundOpened):
            self._book = GroupBooks(self._groups(self._open_row()))
            self._wait_for_shares()
        return event

    def _groups(self, row: books.RoundRow) -> list[MaskGroup]:
        """The groups that were committed with a round."""
        try:
            return [self._group(row.number, kept) for kept in row.config[_TERMS]]
        except (KeyError, ValueError, TypeError, MessageError, msgspec.ValidationError) as error:
            raise StorageError(f"round {row.number} has no usable terms of masking") from error

    def _group(self, number: int, kept: Mapping[str, Any]) -> MaskGroup:
        plain = {**kept["terms"], "roster_sha256": bytes.fromhex(kept["terms"]["roster_sha256"])}
        terms = msgspec.convert(plain, MaskTerms, builtin_types=(bytes,))
        roster = Roster.of([(device, bytes.fromhex(key)) for device, key in kept["members"]])
        masking = self._masking
        return MaskGroup(masking.tenant, masking.fleet, self._plan.run, number, terms, roster)

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
        if not isinstance(body, MaskKeys | MaskShares | MaskOpened) or state != _PHASE_OF[type(body)]:
            return None
        book.add(device, body)
        is_known = isinstance(body, MaskOpened) and book.is_enough
        return ev.MasksKnown() if is_known else ev.MaskAnswered(device)

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
            self._ports.outbox.send_order(device, self._masked_order(order, book.book_of(device).group.terms))
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
        return ev.MaskPhaseOpened(tuple(sorted(self._asked_for_masks)), self._until())

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
        self._asked_for_masks = self._known_book().close_updates(each.device for each in stored)

    def _known_book(self) -> GroupBooks:
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
        """One reply: the mean of all masked updates, of which each group's sum is known.

        Raises:
            RoundError: of too few devices; a group that cannot be unmasked leaves the others as they are.
        """
        means: list[tuple[Any, int]] = []
        failures: list[tuple[MaskBook, RoundError]] = []
        for book in self._known_book().books:
            if not book.delivered:
                continue
            ring = ring_of(book.group.terms)
            try:
                total = unmask(
                    book, self._masked_updates(row, book, ring), ring, self._plan.manifest.params_size
                )
            except RoundError as error:
                failures.append((book, error))
                continue
            count = len(book.delivered)
            means.append((self._mean(total, book.group.terms, count), count))
        count = sum(devices for _, devices in means)
        if failures and count < self._plan.policy.quorum:
            raise failures[0][1]
        if failures:
            self._leave_out(row, [book for book, _ in failures])
        return SummedReplies(_mean_of(means), count)

    def _leave_out(self, row: books.RoundRow, failed: Sequence[MaskBook]) -> None:
        """Ends the updates of groups that cannot be unmasked."""
        lost = frozenset[str]().union(*(book.delivered for book in failed))
        _log.warning("groups_not_unmasked", run=self._plan.run, round=row.number, devices=len(lost))
        self._discard([each for each in self._stored_rows(row.number) if each.device in lost], NOT_UNMASKED)

    def _masked_updates(
        self, row: books.RoundRow, book: MaskBook, ring: Ring
    ) -> Iterator[tuple[str, RingVector]]:
        for each, update in self._stored_updates(row.number, book.delivered):
            yield each.device, ring_vector(update.payload, ring, self._plan.manifest.params_size)

    def _ring(self) -> RingName | None:
        return None if self._book is None else self._book.books[0].group.terms.ring

    # ---- after a restart ---------------------------------------------------------------------------------------

    def _restore_collection(self, row: books.RoundRow, kind: str, state: RoundState) -> RoundState:
        if kind != "train" or _TERMS not in row.config:
            return super()._restore_collection(row, kind, state)
        self._book = book = GroupBooks(self._groups(row))
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

    def _asked(self, row: books.RoundRow, book: GroupBooks) -> frozenset[str]:
        """Who the present phase waits for."""
        if row.state == "keys":
            return frozenset(self._members)
        if row.state == "shares":
            return book.close_keys()
        if row.state == "training":
            return book.sharers
        self._asked_for_masks = book.close_updates(each.device for each in self._stored_rows(row.number))
        return self._asked_for_masks


def _mean_of(means: Sequence[tuple[Any, int]]) -> Any:
    """The mean of means, float32 [P], each weighted by its devices; that of one is itself, bit for bit."""
    if len(means) == 1:
        return means[0][0]
    total = sum(mean.astype(np.float64) * devices for mean, devices in means)
    return np.asarray(total / sum(devices for _, devices in means), np.float32)
