"""Devices, their keys, certificates and presence in SQL.

Laws of the file: each function is one statement of fact within a transaction that the caller owns; every
change of a device or key raises `meta.devices_version`, by which caches in other processes see it. No policy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from cloud_server.db.schema import certificates, device_keys, devices, meta, presence

VERSION_QUERY = "SELECT devices_version FROM meta"
# Every reply needs it. Made once: composing one takes longer than SQLite takes to execute it.
_LOAD_STATUS = sa.select(devices.c.status).where(devices.c.device == sa.bindparam("of_device"))
_HOLD_STATUS = _LOAD_STATUS.with_for_update()
APPROVED, QUARANTINED, REVOKED = "approved", "quarantined", "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """One device. `update_key` is the raw Ed25519 public key in hex; times are unix seconds."""

    device: str
    node_id: int
    pseudonym: str
    label: str = ""
    status: str = APPROVED
    reason: str = ""
    update_key: str
    certificate_serial: str = ""
    certificate_not_after: float = 0.0
    enrolled_at: float
    max_examples: int
    strikes: int = 0
    ring: str = "stable"
    token: str = ""
    struck_at: float = 0.0
    probation_at: float = 0.0


_COLUMNS = [devices.c[name] for name in DeviceRow.__slots__]


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceRow:
    """What a device said of itself last. `boot_id` is hex."""

    device: str
    status: str
    boot_id: str
    release_version: int
    agent_version: str
    last_seen: float


# ---- devices ----


def insert_device(connection: Connection, row: DeviceRow, key_id: str) -> None:
    """A new device and its first update key."""
    values = {name: getattr(row, name) for name in row.__slots__}
    connection.execute(sa.insert(devices).values(**values, changed=raise_version(connection)))
    key = {"key_id": key_id, "device": row.device, "public": row.update_key, "since": row.enrolled_at}
    connection.execute(sa.insert(device_keys).values(**key))


def update_device(connection: Connection, device: str, **values: Any) -> bool:
    """Changes columns of a device; False when there is no such device.

    A new status ends a probation that is not given with it: only who quarantines for strikes lets back by itself.
    """
    if "status" in values:
        values.setdefault("probation_at", 0.0)
    values["changed"] = raise_version(connection)
    changed = connection.execute(
        sa.update(devices).where(devices.c.device == device).values(**values)
    ).rowcount
    return bool(changed)


def load_device(connection: Connection, device: str, *, for_update: bool = False) -> DeviceRow | None:
    """One device; `for_update`: nobody else changes it before the caller's transaction ends."""
    query = sa.select(*_COLUMNS).where(devices.c.device == device)
    row = connection.execute(query.with_for_update() if for_update else query).one_or_none()
    return None if row is None else DeviceRow(**row._mapping)


def load_status(connection: Connection, device: str) -> str:
    """`approved`, `quarantined`, `revoked`, or empty for a name that was never enrolled."""
    return str(connection.execute(_LOAD_STATUS, {"of_device": device}).scalar_one_or_none() or "")


def hold_status(connection: Connection, device: str) -> str:
    """As `load_status`; nobody else changes it before the caller's transaction ends."""
    return str(connection.execute(_HOLD_STATUS, {"of_device": device}).scalar_one_or_none() or "")


def load_devices(connection: Connection, *, since: int = -1) -> list[DeviceRow]:
    """Every device, by name.

    Args:
        since: only those that changed after this version of the register, or of whom a key did.
    """
    query = sa.select(*_COLUMNS).where(devices.c.changed > since).order_by(devices.c.device)
    return [DeviceRow(**row._mapping) for row in connection.execute(query)]


def count_devices(connection: Connection) -> int:
    """How many there are."""
    return int(connection.execute(sa.select(sa.func.count()).select_from(devices)).scalar_one())


def load_pseudonyms(connection: Connection, names: Collection[str]) -> dict[str, str]:
    """What the audit chain calls these devices, by name."""
    query = sa.select(devices.c.device, devices.c.pseudonym)
    # All of them where many are asked for: a list of names in a statement has an end.
    query = query.where(devices.c.device.in_(names)) if len(names) <= 500 else query
    return {row.device: row.pseudonym for row in connection.execute(query)}


def has_key(connection: Connection, key_id: str) -> bool:
    """Whether a key id was ever registered, by whatever device."""
    return (
        connection.execute(sa.select(device_keys).where(device_keys.c.key_id == key_id)).first() is not None
    )


def load_keys(connection: Connection, *, since: int = -1) -> list[tuple[str, str, str]]:
    """The keys in use of devices that are not revoked: (key id, device, public key), keys in hex; `since` as above."""
    query = (
        sa.select(device_keys.c.key_id, device_keys.c.device, device_keys.c.public)
        .join(devices, devices.c.device == device_keys.c.device)
        .where((devices.c.changed > since) & (devices.c.status != REVOKED) & device_keys.c.until.is_(None))
    )
    return [(row.key_id, row.device, row.public) for row in connection.execute(query)]


def load_version(connection: Connection) -> int:
    """A number that grows with every change of devices or keys; `VERSION_QUERY` asks the same by `peek`."""
    return int(connection.exec_driver_sql(VERSION_QUERY).scalar_one())


def raise_version(connection: Connection) -> int:
    """The next version of the register, for a change in this transaction: who changes after us waits for its end."""
    raised = sa.update(meta).values(devices_version=meta.c.devices_version + 1)
    return int(connection.execute(raised.returning(meta.c.devices_version)).scalar_one())


# ---- certificates ----


def insert_certificate(
    connection: Connection, device: str, serial: str, *, issued: float, not_after: float
) -> None:
    """A certificate that was handed out; it becomes the device's newest."""
    values = {"serial": serial, "device": device, "issued": issued, "not_after": not_after}
    connection.execute(sa.insert(certificates).values(**values))
    update_device(connection, device, certificate_serial=serial, certificate_not_after=not_after)


def is_certificate_good(connection: Connection, device: str, serial: str) -> bool:
    """Whether we gave this certificate to this device and did not revoke it (expiry is TLS's to check)."""
    where = (
        (certificates.c.serial == serial)
        & (certificates.c.device == device)
        & certificates.c.revoked.is_(None)
    )
    return connection.execute(sa.select(certificates.c.serial).where(where)).first() is not None


def count_certificates_before(connection: Connection, moment: float, now: float) -> int:
    """How many devices that are not revoked have no newer certificate than one of before a moment, still valid."""
    where = (certificates.c.issued >= moment) & (certificates.c.device == devices.c.device)
    query = (
        sa.select(sa.func.count())
        .select_from(devices)
        .where(devices.c.status != REVOKED)
        .where(devices.c.certificate_not_after > now)
        .where(~sa.exists().where(where))
    )
    return int(connection.execute(query).scalar_one())


def revoke_certificates(connection: Connection, device: str, now: float) -> None:
    """Every certificate of a device that is still valid."""
    is_open = (certificates.c.device == device) & certificates.c.revoked.is_(None)
    connection.execute(sa.update(certificates).where(is_open).values(revoked=now))


def load_revoked_serials(connection: Connection, now: float) -> list[str]:
    """Revoked certificates that have not expired by themselves."""
    where = certificates.c.revoked.is_not(None) & (certificates.c.not_after > now)
    return list(connection.execute(sa.select(certificates.c.serial).where(where)).scalars())


def load_revoked_devices(connection: Connection, now: float) -> set[str]:
    """Revoked devices that have a certificate which has not expired by itself."""
    where = certificates.c.revoked.is_not(None) & (certificates.c.not_after > now)
    query = (
        sa.select(certificates.c.device)
        .join(devices, devices.c.device == certificates.c.device)
        .where(where & (devices.c.status == REVOKED))
        .distinct()
    )
    return set(connection.execute(query).scalars())


# ---- presence ----


def save_presence(connection: Connection, rows: Collection[PresenceRow]) -> None:
    """What known devices said of themselves; replaces what each said before."""
    if not rows:
        return
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    inserted = dialect.insert(presence)
    said = {column.name: inserted.excluded[column.name] for column in presence.c if not column.primary_key}
    upsert = inserted.on_conflict_do_update(index_elements=[presence.c.device], set_=said)
    connection.execute(upsert, [{name: getattr(row, name) for name in row.__slots__} for row in rows])


def load_presence(connection: Connection) -> Mapping[str, PresenceRow]:
    """The presence of every device that ever spoke, by device."""
    return {row.device: PresenceRow(**row._mapping) for row in connection.execute(sa.select(presence))}
