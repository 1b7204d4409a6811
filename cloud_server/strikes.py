"""Strikes: what broken or hostile content costs a device, and the way back.

Laws of the file: only content that a device itself signed, in answer to an order that is open, earns a strike, and
only such as no broker can make out of what honest devices sign: it can drop, delay, double, reorder, cut, replay and
swap messages, and it can keep a newer invitation from a device. What is late, replayed, or trained by an outdated
invitation is refused and costs nothing. A strike is written in the transaction that refuses the reply. Rounds with
sound updates wear strikes off; `device approve` forgives them all, and after a time on probation a device is let back
with one strike left to go. Source: DESIGN.md, laws 4 and 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cloud_server.db import devices as table
from cloud_server.db.audit import append_audit
from cloud_server.db.devices import APPROVED, QUARANTINED, DeviceRow
from cloud_server.db.engine import Connection
from cloud_server.db.rounds import count_sound
from cloud_server.screening import Refusal
from wire.errors import ConfigurationError

STRIKING = frozenset(
    {
        Refusal.MALFORMED,
        Refusal.FOREIGN_ORDER,
        Refusal.WRONG_KIND,
        Refusal.WRONG_ROUND,
        Refusal.WRONG_BASE,
        Refusal.WRONG_SIZE,
        Refusal.NOT_DECODABLE,
        Refusal.NOT_FINITE,
        Refusal.MISSING_METRIC,
        Refusal.IMPLAUSIBLE,
        Refusal.ALREADY_ANSWERED,
    }
)
"""Refusals that speak against the device that signed the reply. Not among them, besides what is late or replayed:
`wrong_codec` and `wrong_model` (an invitation that a broker kept back says another), `foreign_update` (another device
may have taken the id first), `unknown_order` (a cloud restored from a backup has forgotten orders that it sent)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrikePolicy:
    """What strikes lead to.

    Attributes:
        limit: so many strikes put a device into quarantine.
        clean_rounds: sound updates that wear off one strike.
        probation_seconds: after so long in quarantine a device is let back, one strike below the limit; 0: only the
            operator lets it back.

    Raises:
        ConfigurationError: (operator) a value out of bounds; names it.
    """

    limit: int = 5
    clean_rounds: int = 10
    probation_seconds: float = 86_400.0

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("clean_rounds", 1), ("probation_seconds", 0)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least:
                raise ConfigurationError(
                    f"strikes: {name} is {value}", hint=f"use a number from {least} up", name=name
                )


@dataclass(frozen=True, slots=True)
class Struck:
    """A device's strikes after one more, and whether that put it into quarantine."""

    strikes: int
    is_quarantined: bool


def strikes_left(strikes: int, sound_updates: int, policy: StrikePolicy) -> int:
    """What is left of strikes after so many sound updates since the last of them."""
    return max(0, strikes - sound_updates // policy.clean_rounds)


def strike(
    connection: Connection, device: str, refusal: Refusal, *, now: float, policy: StrikePolicy
) -> Struck | None:
    """Counts one refused reply against a device, in the caller's transaction; None for one that is not approved."""
    row = table.load_device(connection, device, for_update=True)
    if row is None or row.status != APPROVED:
        return None
    strikes = 1 + strikes_left(row.strikes, count_sound(connection, device, row.struck_at), policy)
    facts = {"device": row.pseudonym, "refusal": str(refusal), "strikes": strikes}
    append_audit(connection, "device.struck", now, facts)
    if strikes < policy.limit:
        table.update_device(connection, device, strikes=strikes, struck_at=now)
        return Struck(strikes, False)
    table.update_device(
        connection,
        device,
        strikes=strikes,
        struck_at=now,
        status=QUARANTINED,
        reason=f"{strikes} strikes, the last for {refusal}",
        probation_at=now + policy.probation_seconds if policy.probation_seconds else 0.0,
    )
    append_audit(connection, "device.quarantined", now, facts)
    return Struck(strikes, True)


def let_back(connection: Connection, device: str, now: float) -> bool:
    """Ends a quarantine whose probation has come; False where somebody decided otherwise meanwhile."""
    row = table.load_device(connection, device, for_update=True)
    if row is None or not is_probation_due(row, now):
        return False
    # One below the limit: the next bad reply puts it back at once, sound ones wear its strikes off.
    strikes = max(0, row.strikes - 1)
    table.update_device(connection, device, status=APPROVED, reason="", strikes=strikes, struck_at=now)
    append_audit(connection, "device.probation", now, {"device": row.pseudonym, "strikes": strikes})
    return True


def is_probation_due(row: DeviceRow, now: float) -> bool:
    """Whether a device that its strikes quarantined may come back."""
    return row.status == QUARANTINED and 0.0 < row.probation_at <= now
