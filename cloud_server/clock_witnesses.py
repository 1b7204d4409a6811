"""Asks the witnesses of `clock_evidence.py`: what was signed and written here last, the database's clock, the fleet's.

Law of the file: it asks, and judges nothing.
"""

from __future__ import annotations

from cloud_server.clock_evidence import Evidence
from cloud_server.db.audit import newest_entry
from cloud_server.db.engine import Database


def hear_witnesses(
    now: float, *, signed_at: float | None, database: Database | None, devices_ahead: float | None
) -> Evidence:
    """What is known about the time, outside of a transaction.

    Args:
        now: by our clock (unix seconds).
        signed_at: when something was signed here last; None: never.
        database: is asked for the last entry of its audit chain, and for its clock; None: not asked.
        devices_ahead: seconds that we are ahead of the fleet; None: nobody knows.

    Raises:
        StorageError: (disk) the database cannot be read.
    """
    seen, server = [] if signed_at is None else [signed_at], None
    if database is not None:
        with database.read() as connection:
            entry = newest_entry(connection)
        seen += [] if entry is None else [entry.at]
        server = database.server_now()
    return Evidence(now=now, newest=max(seen, default=None), database=server, devices_ahead=devices_ahead)
