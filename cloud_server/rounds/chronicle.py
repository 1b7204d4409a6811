"""What a round leaves in the audit chain: who contributed which bytes, with which weight, to which head.

Law of the file: it is called in the transaction that ends the round, with the replies that counted in it, so that
the chain and the head agree whatever instruction the process ends at. A contribution names a device by its
pseudonym and a body by its hash: neither what was learned nor a name is kept (why a round failed is in its row,
since a reason may name a device).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cloud_server.db.audit import append_audit
from cloud_server.db.devices import load_pseudonyms
from cloud_server.db.engine import Connection
from cloud_server.db.rounds import RoundRow, UpdateRow

ROUND_FOLDED, ROUND_FAILED, EXCHANGE_DONE = "round.folded", "round.failed", "exchange.done"


def note_round(
    connection: Connection,
    kind: str,
    run: str,
    row: RoundRow,
    replies: Iterable[UpdateRow],
    now: float,
    **facts: Any,
) -> None:
    """Adds the entry of a round that ended.

    Args:
        replies: those that counted, in the canonical order.
        facts: what else is to be said (`head`), plain values.
    """
    counted = list(replies)
    pseudonyms = load_pseudonyms(connection, {reply.device for reply in counted})
    body = {
        "run": run,
        "round": row.number,
        "base": row.base_sha256.hex(),
        "started": row.started,
        "replies": [_reply(reply, pseudonyms) for reply in counted],
        **facts,
    }
    append_audit(connection, kind, now, body)


def _reply(reply: UpdateRow, pseudonyms: Mapping[str, str]) -> dict[str, Any]:
    return {
        "device": pseudonyms[reply.device],
        "body": reply.body_sha256.hex(),
        "examples": reply.num_examples,
        "received": reply.received_at,
    }
