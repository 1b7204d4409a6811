"""Who waits for a person: devices that came by a token of many, and those whose token was claimed twice.

Law of the file: reading only; what an operator decides is `Registry.approve` or `Registry.revoke`.
"""

from __future__ import annotations

from cloud_server.db.devices import QUARANTINED, DeviceRow

WAITING = "waiting for approval"
CLAIMED_TWICE = "its token was claimed twice"


def is_pending(row: DeviceRow) -> bool:
    """Whether a device has never been approved."""
    return row.status == QUARANTINED and row.reason.startswith(WAITING)


def is_claimed_twice(row: DeviceRow) -> bool:
    """Whether somebody else came with a device's spent token, and nobody has looked into it yet."""
    return row.status == QUARANTINED and CLAIMED_TWICE in row.reason
