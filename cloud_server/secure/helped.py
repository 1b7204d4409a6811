"""Performs a round whose masks a helper takes away: it is asked for the sum of the masks of what is folded.

Laws of the file: whose updates count is committed before the helper is asked, so that after a restart the same question
is asked, and answered the same; what the helper says is held in memory and never stored; who has no folded vector is
not in the question. Source: docs/protocol.md, clause 15; docs/architecture.md (Secure aggregation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import msgspec
import numpy as np

from cloud_server.db import rounds as books
from cloud_server.db.incarnation import load_incarnation
from cloud_server.rounds import events as ev
from cloud_server.rounds.intake import Intake
from cloud_server.rounds.orders import order_message
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.state import Phase
from cloud_server.secure.helper_client import AskedHelper
from cloud_server.secure.summed import ENVELOPE_BYTES, SummedPerformer, SummedReplies
from process.logs import get_logger
from wire.errors import QuorumError, RoundError, StorageError
from wire.helper import HelperAnswer, HelperQuestion, HelperRefusal
from wire.mask_terms import MAX_HELPED_MEMBERS, HelpedTerms, RingName
from wire.masking import MIN_MEMBERS
from wire.messages import MAX_BODY_BYTES, encode_body
from wire.ring import ring_of, ring_vector

_log = get_logger("cloud.secure")
_TERMS: Final = "helped"
UNUSABLE: Final = "unusable_seed"


@dataclass(frozen=True, slots=True, kw_only=True)
class HelpedPorts:
    """What such a run needs beyond what every run is lent.

    Attributes:
        dropout: share of a cohort without which a sum is still told, where devices add noise to it.
        colluding: share of a cohort that may tell the noise that they drew.
    """

    tenant: str
    fleet: str
    helper: AskedHelper
    dropout: float = 0.2
    colluding: float = 0.1


class HelpedPerformer(SummedPerformer):
    """Drives a run by a strategy that sees means only, which a helper unmasks. Raises as `SummedPerformer`."""

    _terms: ClassVar = _TERMS
    _closed: ClassVar = "asking"
    _phases: ClassVar = {**SummedPerformer._phases, "asking": Phase.ASKING}

    def __init__(self, plan: RunPlan, ports: RunPorts, intake: Intake, *, helped: HelpedPorts) -> None:
        super().__init__(plan, ports, intake)
        self._helped = helped
        self._asked: tuple[bytes, tuple[books.UpdateRow, ...]] | None = None
        self._masks: bytes | None = None
        self._performers |= {ev.AskHelper: self._ask_helper}

    # ---- opening -----------------------------------------------------------------------------------------------

    def _committed_terms(self, number: int, devices: Sequence[str]) -> dict[str, Any]:
        if not MIN_MEMBERS <= len(devices) <= MAX_HELPED_MEMBERS:
            raise QuorumError(
                f"a round with a helper has {MIN_MEMBERS} to {MAX_HELPED_MEMBERS} devices, not {len(devices)}",
                present=len(devices),
            )
        helped = self._helped
        with self._database.read() as connection:
            life = load_incarnation(connection)
        ring, noise = self._terms_for(len(devices), dropout=helped.dropout, colluding=helped.colluding)
        terms = HelpedTerms(
            members=len(devices),
            ring=ring.name,
            value_bits=ring.value_bits,
            bound=ring.bound,
            helper_key_id=helped.helper.key.key_id,
            life=life,
            noise=noise,
        )
        return {_TERMS: msgspec.to_builtins(terms) | {"helper_key_id": terms.helper_key_id.hex()}}

    def _terms_of(self, row: books.RoundRow) -> HelpedTerms:
        """The terms that were committed with a round."""
        try:
            kept = dict(row.config[_TERMS])
            kept["helper_key_id"] = bytes.fromhex(kept["helper_key_id"])
            return msgspec.convert(kept, HelpedTerms, builtin_types=(bytes,))
        except (KeyError, ValueError, TypeError, msgspec.ValidationError) as error:
            raise StorageError(f"round {row.number} has no usable terms of masking") from error

    def _ring(self) -> RingName | None:
        row = self._round
        return None if row is None or _TERMS not in row.config else self._terms_of(row).ring

    def _send(self, order: books.OrderRow) -> None:
        if order.kind != "train":
            super()._send(order)
            return
        terms = self._terms_of(self._open_row())
        payload = self._plan.manifest.params_size * ring_of(terms).dtype.itemsize
        slot_bytes = min(MAX_BODY_BYTES, int(1.2 * payload) + ENVELOPE_BYTES)
        message = order_message(self._plan, order, self._train())
        self._ports.outbox.send_order(
            order.device, msgspec.structs.replace(message, helped=terms, slot_bytes=slot_bytes)
        )

    # ---- the helper --------------------------------------------------------------------------------------------

    def _ask_helper(self, _action: ev.AskHelper) -> ev.Event | None:
        if self._asked is None:
            self._asked = self._question()
        question, rows = self._asked
        if not rows:
            return ev.HelperAnswered("there is no update to unmask")
        _log.info("helper_asked", run=self._plan.run, round=self._open_row().number, devices=len(rows))
        self._helped.helper.ask(question, self._total_bytes())
        return None

    def _question(self) -> tuple[bytes, tuple[books.UpdateRow, ...]]:
        """The question about what is committed, and whose seed stands at each place; always the same bytes."""
        row, helped = self._open_row(), self._helped
        found = [(each, update.sealed_seed) for each, update in self._stored_updates(row.number)]
        if not found:
            return b"", ()
        found.sort(key=lambda pair: pair[0].device)
        question = HelperQuestion(
            tenant=helped.tenant,
            fleet=helped.fleet,
            run=self._plan.run,
            round_number=row.number,
            terms=self._terms_of(row),
            params_size=self._plan.manifest.params_size,
            seeds=tuple(sealed for _, sealed in found),
        )
        return encode_body(question), tuple(each for each, _ in found)

    def _total_bytes(self) -> int:
        ring = ring_of(self._terms_of(self._open_row()))
        return self._plan.manifest.params_size * ring.dtype.itemsize

    def poll(self, phase: Phase, *, is_paused: bool) -> ev.Event | None:
        """See `Desk.poll`: what the helper said."""
        if phase is not Phase.ASKING or self._asked is None:
            return None
        said = self._helped.helper.take(self._asked[0])
        if isinstance(said, HelperAnswer):
            self._masks = said.total
            return ev.HelperAnswered()
        return None if said is None else self._refused(said)

    def _refused(self, refusal: HelperRefusal) -> ev.Event | None:
        """Nothing was told. Without the devices whose seeds cannot be summed, another question may be asked."""
        rows = self._asked[1] if self._asked is not None else ()
        unusable = [rows[place] for place in refusal.unusable if place < len(rows)]
        left = len(rows) - len(unusable)
        if refusal.reason != "unusable" or not unusable or left < self._plan.policy.quorum:
            said = f"the helper told no masks of {len(rows)} devices ({refusal.reason})"
            return ev.HelperAnswered(f"{said}; it can sum those of {left}" if unusable else said)
        names = ", ".join(row.device for row in unusable)[:200]
        _log.warning("seeds_unusable", run=self._plan.run, devices=names, left=left)
        self._discard(unusable, UNUSABLE)
        self._asked = None
        return self._ask_helper(ev.AskHelper())

    # ---- the fold ----------------------------------------------------------------------------------------------

    def _stored_replies(self, row: books.RoundRow) -> SummedReplies:  # type: ignore[override]
        """One reply: the mean of all masked updates, without their masks."""
        ring, size = ring_of(self._terms_of(row)), self._plan.manifest.params_size
        if self._masks is None:
            raise RoundError("the helper has not told the sum of the masks")
        total, count = np.zeros(size, ring.dtype), 0
        for _, update in self._stored_updates(row.number):
            np.add(total, ring_vector(update.payload, ring, size), out=total)
            count += 1
        np.subtract(total, ring_vector(self._masks, ring, size), out=total)
        return SummedReplies(self._mean(total, self._terms_of(row), count), count)

    def _end_round(self) -> None:
        super()._end_round()
        self._asked, self._masks = None, None

    def _commit_fold(self, action: ev.CommitFold) -> None:
        super()._commit_fold(action)
        self._asked, self._masks = None, None
