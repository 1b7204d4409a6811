"""Erasing a device's name: what is kept of it afterwards belongs to nobody.

Laws of the file: it happens in one transaction, or not at all; nothing is deleted that others depend on (rounds stay
countable, revoked keys and certificates stay refused): the rows go over to a nameless device with another pseudonym,
so that neither the name nor what the audit chain says of it leads to them. The chain itself is not touched.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.devices import DeviceRow, raise_version
from cloud_server.db.schema import devices, metadata, orders, presence, tokens

ERASED_PREFIX = "erased-"
_OPEN = ("committed", "sent", "accepted")


def has_open_orders(connection: Connection, device: str, now: float) -> bool:
    """Whether a round that has not ended waits for the device."""
    where = (orders.c.device == device) & orders.c.state.in_(_OPEN) & (orders.c.deadline > now)
    return connection.execute(sa.select(orders.c.order_id).where(where).limit(1)).first() is not None


def erase_device(connection: Connection, row: DeviceRow) -> str:
    """Makes a revoked device nameless; returns what its rows are called now."""
    name = ERASED_PREFIX + secrets.token_hex(8)
    columns = [column.name for column in devices.c]
    # The node id is unique, and moves over when the old row is gone: past rounds name their cohort by it.
    fresh = {
        "device": name,
        "node_id": -row.node_id,
        "pseudonym": secrets.token_hex(16),
        "label": "",
        "reason": "erased",
    }
    source = [sa.literal(fresh[each]) if each in fresh else devices.c[each] for each in columns]
    connection.execute(
        sa.insert(devices).from_select(columns, sa.select(*source).where(devices.c.device == row.device))
    )
    for table in metadata.sorted_tables:
        if table is devices or table is presence or "device" not in table.c:
            continue
        connection.execute(sa.update(table).where(table.c.device == row.device).values(device=name))
    connection.execute(sa.delete(presence).where(presence.c.device == row.device))
    for column in (tokens.c.name, tokens.c.claimed_by):
        connection.execute(sa.update(tokens).where(column == row.device).values({column.name: name}))
    connection.execute(sa.delete(devices).where(devices.c.device == row.device))
    moved = {"node_id": row.node_id, "changed": raise_version(connection)}
    connection.execute(sa.update(devices).where(devices.c.device == name).values(**moved))
    return name
