"""The real agent with somebody who writes down what it makes: `python -m fleet.real_chaos.witness FILE run …`.

Laws of the file: nothing of the agent is changed; what goes into its outbox is noted before the commit (`made`, with
the bytes) and after it (`kept`), in a file that the agent never reads, by one write each, so that a kill between any
two instructions leaves either line or none. Imports what the agent imports and no more.
"""

from __future__ import annotations

import json
import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any

from edge_agent import cli
from edge_agent.store.outbox import Outbox


class Witness:
    """Lines of JSON at the end of a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        # A line that a kill tore is ended, and is no line.
        os.write(self._file, b"\n")

    def note(self, **what: Any) -> None:
        """One line."""
        os.write(self._file, json.dumps(what).encode() + b"\n")


def watch_outbox(witness: Witness) -> None:
    """Notes every row that the outbox takes, from now on."""
    put = Outbox.put

    @wraps(put)
    def noted(outbox: Outbox, update_id: bytes, *others: Any, **named: Any) -> bool:
        order_id, _run, round_number, kind, body = others[:5]
        name = update_id.hex()
        witness.note(made=name, order=order_id.hex(), round=round_number, kind=kind, body=bytes(body).hex())
        is_new = put(outbox, update_id, *others, **named)
        if is_new:
            witness.note(kept=name)
        return is_new

    setattr(Outbox, "put", noted)  # noqa: B010  a witness stands between the agent and the real method


def main() -> int:
    """The agent's own command behind the witness's file."""
    watch_outbox(Witness(Path(sys.argv[1])))
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
