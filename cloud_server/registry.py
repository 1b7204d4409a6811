"""The register of devices: who they are, what they may, which keys are theirs, which of them are here.

Laws of the file: the database decides and this file only remembers; what another process changed (a
revocation on the command line) is seen by the next call, because every call compares `devices_version`; a
device's id is for ever, only its label changes. Presence is the one thing that is known here first: a whole fleet may
come at once, so it is written for many together (`write_presence`), and a crash in between costs nothing, since births
are retained at the broker and heartbeats go on.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from cloud_server.db import devices as table
from cloud_server.db.audit import append_audit
from cloud_server.db.devices import APPROVED, QUARANTINED, REVOKED, DeviceRow, PresenceRow
from cloud_server.db.engine import Connection, Database
from cloud_server.strikes import is_probation_due, let_back
from process.clock import Clock
from process.logs import get_logger
from wire.agent_versions import is_new_enough
from wire.envelope import Signer
from wire.errors import ConfigurationError, PeerError, StorageError, TrustError
from wire.messages import Birth
from wire.primitives import VerifyKey
from wire.topics import ID

AGGREGATOR_NAME = "aggregator"
"""What the aggregator is called at the broker: a device of this name would have its rights."""
DEFAULT_MAX_EXAMPLES = 100_000
MAX_LABEL_CHARS = 128
_log = get_logger("cloud.registry")
# A heartbeat alone is worth a write to the disk only this often.
_SEEN_EVERY_SECONDS = 60.0


@dataclass(frozen=True)
class _Known:
    """The register as it was at one version."""

    version: int
    devices: Mapping[str, DeviceRow]
    signers: Mapping[bytes, Signer]
    by_node: Mapping[int, str]


_NOTHING = _Known(-1, {}, {}, {})


class Registry:
    """The register of one fleet. Safe to use from many threads. A `NodeDirectory` of the round machine.

    Args:
        min_agent_version: devices whose agent is older are not asked for rounds; empty for none.
    """

    def __init__(self, database: Database, clock: Clock, *, min_agent_version: str = "") -> None:
        self.min_agent_version = min_agent_version
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._known = _NOTHING
        self._unwritten: set[str] = set()
        self._born: set[str] = set()
        with database.read() as connection:
            self._presence = dict(table.load_presence(connection))

    # ---- looking up ----

    def devices(self) -> list[DeviceRow]:
        """Every device, by name."""
        return list(self._current().devices.values())

    def show(self, device: str) -> DeviceRow:
        """One device.

        Raises:
            ConfigurationError: (operator) there is no such device.
        """
        return _found(self._current(), device)

    def status(self, device: str) -> str:
        """`approved`, `quarantined`, `revoked`, or empty for a name that was never enrolled."""
        row = self._current().devices.get(device)
        return "" if row is None else row.status

    def signers(self) -> Mapping[bytes, Signer]:
        """Key id → signer, of every device that is not revoked; what `wire.envelope` opens messages with.

        One query when nothing changed: a receiver of many messages asks once per batch.
        """
        return self._current().signers

    def node_id(self, device: str) -> int:
        """Flower's node id of a device, present or not; raises like `show`."""
        return self.show(device).node_id

    def device_of(self, node_id: int) -> str:
        """The device of a node id.

        Raises:
            ConfigurationError: (us) there is no such node.
        """
        device = self._current().by_node.get(node_id)
        if device is None:
            raise ConfigurationError(f"there is no node {node_id}", node_id=node_id)
        return device

    def max_examples(self, device: str) -> int:
        """The cap on `num_examples` of one update; raises like `show`."""
        return self.show(device).max_examples

    # ---- presence ----

    def present(self) -> Mapping[str, int]:
        """Device → node id, of the approved devices that are online and whose agent is new enough, by name."""
        known, least = self._current(), self.min_agent_version
        with self._lock:
            online = {
                device
                for device, row in self._presence.items()
                if row.status == "online" and is_new_enough(row.agent_version, least)
            }
        return {
            name: row.node_id
            for name, row in known.devices.items()
            if name in online and row.status == APPROVED
        }

    def presence(self) -> Mapping[str, PresenceRow]:
        """What each device said of itself last."""
        with self._lock:
            return MappingProxyType(dict(self._presence))

    def is_back(self, device: str, birth: Birth) -> bool:
        """Whether a birth, before `note_birth` keeps it, is that of a device which nobody saw leave: its broker died,
        or its last will was lost.

        The first of each since this process started may be an old one that the broker kept, unless it names another
        boot; and one that names another release is said in the middle of a session.
        """
        with self._lock:
            before, is_first = self._presence.get(device), device not in self._born
        if birth.status != "online" or before is None or before.status != "online":
            return False
        if before.boot_id != birth.boot_id.hex():
            return True
        return not is_first and before.release_version == birth.release_version

    def note_birth(self, device: str, birth: Birth) -> bool:
        """Keeps a birth, goodbye or last will. A goodbye of an earlier boot never ends the present one.

        Returns:
            Whether the device came or went by it.

        Raises:
            PeerError: (peer) the device is unknown or revoked.
        """
        row = PresenceRow(
            device=device,
            status=birth.status,
            boot_id=birth.boot_id.hex(),
            release_version=birth.release_version,
            agent_version=birth.agent_version,
            last_seen=self._clock.now(),
        )
        self._check_may_speak(device)
        with self._lock:
            before = self._presence.get(device)
            if before is not None and row.status != "online" and row.boot_id != before.boot_id:
                return False
            self._born.add(device)
        self._keep_presence(row)
        if row.status == "online" and not is_new_enough(row.agent_version, self.min_agent_version):
            _log.warning(
                "agent_too_old", device=device, version=row.agent_version, least=self.min_agent_version
            )
        return (before is not None and before.status == "online") != (row.status == "online")

    def note_seen(self, device: str, release_version: int) -> bool:
        """A report of a device says that it is here; nothing happens for one that had no birth yet.

        Returns:
            Whether the device came back by it.
        """
        with self._lock:
            before = self._presence.get(device)
        if before is None:
            return False
        now = self._clock.now()
        row = replace(before, last_seen=now, release_version=release_version, status="online")
        is_back = before.status != "online"
        # Also when the clock was set back: the device must not look young for ever.
        is_old = abs(now - before.last_seen) >= _SEEN_EVERY_SECONDS
        if is_back or is_old or row.release_version != before.release_version:
            self._keep_presence(row)
        return is_back

    def note_lost(self, device: str) -> None:
        """The device does not answer: it is not asked again before it speaks."""
        with self._lock:
            before = self._presence.get(device)
        if before is not None and self.status(device):  # its name may be erased
            self._keep_presence(replace(before, status="lost"))

    def write_presence(self) -> None:
        """Writes all that was noted since, in one transaction.

        Raises:
            StorageError: (disk) the database refused, or another aggregator has taken over; nothing is forgotten.
        """
        if not self._unwritten:
            return
        known = self._current().devices
        with self._lock:
            taken, self._unwritten = self._unwritten, set()
            # A device whose name was erased meanwhile has no row to go with.
            rows = [self._presence[device] for device in sorted(taken) if device in known]
        try:
            with self._database.transaction(fence=self._database.claimed) as connection:
                table.save_presence(connection, rows)
        except StorageError:
            with self._lock:
                self._unwritten |= taken
            raise

    def _keep_presence(self, row: PresenceRow) -> None:
        with self._lock:
            self._presence[row.device] = row
            self._unwritten.add(row.device)

    def check_writer(self) -> None:
        """Raises `StorageError` when another aggregator has taken over the database of this one."""
        self._database.check_claim()

    def _check_may_speak(self, device: str) -> None:
        status = self.status(device)
        if status in ("", REVOKED):
            raise PeerError(f"device {device} is {status or 'unknown'}", device=device)

    # ---- changes by the operator ----

    def revoke(self, device: str, reason: str = "") -> None:
        """Ends a device's trust for good: keys, certificates, its place in rounds. Raises like `show`."""
        row = self.show(device)
        now = self._clock.now()
        with self._database.transaction(fence=self._database.claimed) as connection:
            table.revoke_certificates(connection, device, now)
            self._change(connection, row, "device.revoked", status=REVOKED, reason=reason)

    def quarantine(self, device: str, reason: str = "") -> None:
        """Keeps a device out of rounds until it is approved again.

        Raises:
            ConfigurationError: (operator) no such device, or it is revoked.
        """
        row = self._not_revoked(device)
        with self._database.transaction(fence=self._database.claimed) as connection:
            self._change(connection, row, "device.quarantined", status=QUARANTINED, reason=reason)

    def approve(self, device: str) -> None:
        """Lets a device out of quarantine, its strikes forgiven. Raises like `quarantine`."""
        row = self._not_revoked(device)
        with self._database.transaction(fence=self._database.claimed) as connection:
            self._change(
                connection, row, "device.approved", status=APPROVED, reason="", strikes=0, struck_at=0.0
            )

    def rename(self, device: str, label: str) -> None:
        """Gives a device another label for people; its id is in its certificate and stays.

        Raises:
            ConfigurationError: (operator) no such device, or the label is too long.
        """
        row = self.show(device)
        if len(label) > MAX_LABEL_CHARS or not label.isprintable():
            raise ConfigurationError(
                "the label cannot be used", hint=f"at most {MAX_LABEL_CHARS} printable characters"
            )
        with self._database.transaction(fence=self._database.claimed) as connection:
            self._change(connection, row, "device.renamed", label=label)

    def end_probations(self) -> list[str]:
        """Lets back the devices whose strikes put them into quarantine long enough ago; returns who they are."""
        now = self._clock.now()
        back: list[str] = []
        for row in self.devices():
            if not is_probation_due(row, now):
                continue
            with self._database.transaction(fence=self._database.claimed) as connection:
                is_back = let_back(connection, row.device, now)
            if is_back:
                _log.info("device_on_probation", device=row.device, strikes=row.strikes)
                back.append(row.device)
        return back

    def _not_revoked(self, device: str) -> DeviceRow:
        row = self.show(device)
        if row.status == REVOKED:
            raise ConfigurationError(
                f"device {device} is revoked", hint="a revoked device is enrolled anew, under another name"
            )
        return row

    def _change(self, connection: Connection, row: DeviceRow, kind: str, **values: str | int | float) -> None:
        table.update_device(connection, row.device, **values)
        # A label or a reason may name a person; the chain is for ever, so it says what changed and not to
        # what.
        body = {"device": row.pseudonym, "changed": sorted(values)}
        append_audit(connection, kind, self._clock.now(), body)

    # ---- the cache ----

    def _current(self) -> _Known:
        with self._lock:
            known = self._known
        if self._database.peek(table.VERSION_QUERY) == known.version:
            return known
        with self._database.read() as connection:
            known = _brought_up(known, connection)
        with self._lock:
            if known.version > self._known.version:
                self._known = known
        return known


def _brought_up(known: _Known, connection: Connection) -> _Known:
    """The register as it is now, from what changed: thousands who enrol must not each cost a pass over all."""
    version, since = table.load_version(connection), known.version
    rows = {row.device: row for row in table.load_devices(connection, since=since)}
    keys = table.load_keys(connection, since=since)
    devices = {**known.devices, **rows}
    if since != _NOTHING.version and len(devices) != table.count_devices(connection):
        # One is gone, and who it was stands nowhere.
        return _brought_up(_NOTHING, connection)
    if len(devices) != len(known.devices):
        devices = dict(sorted(devices.items()))
    signers = dict(known.signers)
    if not rows.keys().isdisjoint(known.devices):
        signers = {key: signer for key, signer in signers.items() if signer.device not in rows}
    signers |= {bytes.fromhex(i): Signer(name, VerifyKey(bytes.fromhex(p))) for i, name, p in keys}
    by_node = {**known.by_node, **{row.node_id: name for name, row in rows.items()}}
    return _Known(version, MappingProxyType(devices), MappingProxyType(signers), MappingProxyType(by_node))


def add_device(
    connection: Connection,
    device: str,
    update_key: VerifyKey,
    *,
    now: float,
    status: str = APPROVED,
    reason: str = "",
    ring: str = "stable",
    max_examples: int = DEFAULT_MAX_EXAMPLES,
    token: str = "",
) -> DeviceRow:
    """Writes a new device in the caller's transaction: enrolment does it, and a simulation for its fleet.

    Its node id comes from its key, so that the same keys make the same fleet.

    Raises:
        TrustError: (peer) the name is no id, or name or key are taken (`code`).
    """
    if not ID.fullmatch(device):
        raise TrustError(
            f"{device[:80]!r} cannot be a device's name", code="name", hint="use A-Z a-z 0-9 _ - (1 to 64)"
        )
    if device == AGGREGATOR_NAME or table.load_device(connection, device) is not None:
        raise TrustError(f"the name {device} is taken", code="name_taken", hint="choose another name")
    key_id = update_key.key_id.hex()
    if table.has_key(connection, key_id):
        raise TrustError("this update key is registered already", code="update_key")
    row = DeviceRow(
        device=device,
        node_id=node_id_of(update_key),
        pseudonym=secrets.token_hex(16),
        status=status,
        reason=reason,
        update_key=update_key.public_bytes.hex(),
        enrolled_at=now,
        max_examples=max_examples,
        ring=ring,
        token=token,
    )
    table.insert_device(connection, row, key_id)
    append_audit(
        connection, "device.enrolled", now, {"device": row.pseudonym, "key": key_id, "status": status}
    )
    return row


def node_id_of(update_key: VerifyKey) -> int:
    """1 … 2**63 − 1, from the key's hash."""
    digest = hashlib.sha256(b"shoal node id\0" + update_key.public_bytes).digest()
    return (int.from_bytes(digest[:8], "big") >> 1) or 1


def _found(known: _Known, device: str) -> DeviceRow:
    row = known.devices.get(device)
    if row is None:
        raise ConfigurationError(
            f"there is no device {device[:80]!r}",
            hint="`shoal-cloud device list` names them all",
            device=device[:80],
        )
    return row
