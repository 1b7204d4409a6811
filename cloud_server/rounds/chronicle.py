"""What a round leaves in the audit chain: who contributed which bytes, with which weight, to which head.

Law of the file: it is called in the transaction that ends the round, with the replies that counted in it, so that
the chain and the head agree whatever instruction the process ends at. A contribution names a device by its
pseudonym and a body by its hash: neither what was learned nor a name is kept (why a round failed is in its row,
since a reason may name a device).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloud_server.db.audit import append_audit
from cloud_server.db.devices import load_pseudonyms
from cloud_server.db.engine import Connection
from cloud_server.db.rounds import RoundRow, UpdateRow

ROUND_FOLDED, ROUND_FAILED, EXCHANGE_DONE = "round.folded", "round.failed", "exchange.done"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an update of a buffered round comes from: the checkpoint that it was trained on (32 bytes), the round that
    asked for it, and how many heads came between that and the round that it counts in."""

    base_sha256: bytes
    asked_in: int
    staleness: int

    def factor(self, exponent: float) -> float:
        """What of its step counts, in (0, 1]."""
        return float((1.0 + self.staleness) ** -exponent)


def note_round(
    connection: Connection,
    kind: str,
    run: str,
    row: RoundRow,
    replies: Iterable[UpdateRow],
    now: float,
    origins: Mapping[bytes, Origin] | None = None,
    /,
    **facts: Any,
) -> None:
    """Adds the entry of a round that ended.

    Args:
        replies: those that counted, in the canonical order.
        origins: of a buffered round's replies, by update id.
        facts: what else is to be said (`head`), plain values.
    """
    counted, origins = list(replies), origins or {}
    pseudonyms = load_pseudonyms(connection, {reply.device for reply in counted})
    body = {
        "run": run,
        "round": row.number,
        "base": row.base_sha256.hex(),
        "started": row.started,
        "replies": [_reply(reply, pseudonyms, origins.get(reply.update_id)) for reply in counted],
        **facts,
    }
    append_audit(connection, kind, now, body)


def _reply(reply: UpdateRow, pseudonyms: Mapping[str, str], origin: Origin | None) -> dict[str, Any]:
    own = {} if origin is None else {"base": origin.base_sha256.hex(), "staleness": origin.staleness}
    return {
        "device": pseudonyms[reply.device],
        "body": reply.body_sha256.hex(),
        "examples": reply.num_examples,
        "received": reply.received_at,
        **own,
    }
