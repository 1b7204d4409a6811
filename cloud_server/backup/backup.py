"""Makes a backup while the aggregator runs, and brings an aggregator back from one.

Laws of the file: the database is copied first and at one moment, then the files that it names, so that everything it
names is there (a file that was dropped in between makes the copy begin anew); the offline keys are never in a backup,
and broker state never is: devices send again what has no receipt. What comes back is another life of the same
deployment: its incarnation, its epochs and the versions of all that it signs go up before anything can hear it
(`db/incarnation.py`, `TufRepository.outrun`). Source: docs/runbook.md, "Backup and restore".
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloud_server.artefacts import blob_key
from cloud_server.backup.archive import FORMAT, ArchiveWriter, Listing, files_below, unpack
from cloud_server.db.audit import append_audit, newest_entry
from cloud_server.db.durability import newest_number, note_backup
from cloud_server.db.engine import open_database
from cloud_server.db.incarnation import Incarnation, load_blob_keys, reincarnate
from cloud_server.db.overview import load_incarnation
from cloud_server.db.privacy import last_charge
from cloud_server.deployment import Deployment
from cloud_server.layout import StateFolder
from cloud_server.privacy.keys import open_ledger_keys
from cloud_server.privacy.ledger import anchored_charges
from cloud_server.privacy.plan import PrivacyPlan
from cloud_server.privacy.restore import charge_lost_rounds, check_charges
from cloud_server.settings import load_cloud_settings
from cloud_server.standby import check_unheld
from process.clock import Clock
from process.logs import get_logger
from wire.errors import ConfigurationError, StorageError

_log = get_logger("cloud.backup")

_DATABASE: Final = "cloud.db"
_FORMAT: Final = "FORMAT"
_OFFLINE: Final = "offline/"
_TRIES: Final = 5


class _DroppedError(StorageError):
    """A file was dropped while it was to be copied."""


def make_backup(deployment: Deployment, path: Path) -> Listing:
    """Copies a deployment into one file; the service may run.

    Raises:
        ConfigurationError: (operator) the file is there, or the database is not SQLite.
        StorageError: (disk) something cannot be read or written.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            return _copy(deployment, path)
        except _DroppedError:
            if attempt == _TRIES:
                raise
    raise StorageError(f"{path} could not be made")


def _copy(deployment: Deployment, path: Path) -> Listing:
    folder, settings = deployment.folder, deployment.settings
    with (
        ArchiveWriter(path) as archive,
        tempfile.TemporaryDirectory(prefix=".backup-", dir=folder.root) as scratch,
    ):
        copy = Path(scratch) / _DATABASE
        # The signed repository must not change between the database and its own files.
        with folder.lock("tuf"):
            deployment.database.snapshot(copy)
            needed, incarnation, entries, stored = _facts(copy)
            is_inside = not settings.storage.artefacts
            if is_inside:
                _add_below(archive, folder.artefacts / "tuf", "artefacts/tuf")
        archive.add(_DATABASE, copy)
        if is_inside:
            for place in ("blobs", "releases"):
                _add_below(archive, folder.artefacts / place, f"artefacts/{place}")
            missing = {f"artefacts/{blob_key(key)}" for key in needed} - archive.names
            if missing:
                raise _DroppedError(f"{min(missing)} was dropped meanwhile", hint="try again")
        for name in (_FORMAT, "settings.toml"):
            archive.add(name, folder.root / name)
        for whole in (folder.keys, folder.authority, folder.bundles):
            _add_below(archive, whole, whole.name)
        listing = Listing(
            format=FORMAT,
            tenant=settings.tenant,
            fleet=settings.fleet,
            created=deployment.clock.now(),
            incarnation=incarnation,
            audit_entries=entries,
            artefacts=settings.storage.artefacts,
            files={},
        )
        archive.finish(listing)
    try:
        # Devices may let go of what is in it; what was stored meanwhile is not.
        with deployment.database.transaction() as connection:
            note_backup(connection, stored)
    except StorageError as error:
        # The backup is good all the same; the next one vouches for these, too.
        _log.warning("backup_not_noted", reason=str(error))
    return listing


def _add_below(archive: ArchiveWriter, folder: Path, prefix: str) -> None:
    for name, path in files_below(folder):
        if prefix == "keys" and name.startswith(_OFFLINE):
            continue
        try:
            archive.add(f"{prefix}/{name}", path)
        except StorageError:
            if path.exists():
                raise
            # Dropped since the folder was listed; whether it is missed, the database knows.


def _facts(copy: Path) -> tuple[set[str], int, int, int]:
    """What a copy of the database needs, and which it is: (blobs, incarnation, audit entries, stored updates)."""
    database = open_database(f"sqlite:///{copy}")
    try:
        with database.read() as connection:
            last = newest_entry(connection)
            found = load_blob_keys(connection), load_incarnation(connection)
            return *found, 0 if last is None else last.seq, newest_number(connection)
    finally:
        database.close()


@dataclass(frozen=True, slots=True)
class Restored:
    """What came back.

    Attributes:
        graphs_outrun: whether the targets key was there to sign above what devices may know.
        audit_entries: of the chain, as far as it came back.
        made: when the backup was made, unix seconds; None where only its own tools know.
        lost_charges: private rounds that were charged after the backup, and are charged now.
    """

    incarnation: Incarnation
    graphs_outrun: bool
    audit_entries: int
    made: float | None = None
    lost_charges: int = 0


def restore_backup(
    path: Path,
    root: Path,
    *,
    offline: Path | None = None,
    clock: Clock | None = None,
    charges: int | None = None,
) -> Restored:
    """Makes a state folder of a backup, as another life of the deployment.

    Args:
        offline: where the offline keys are; needed when a model may have been imported after the backup.
        charges: how many rounds were charged to the privacy budget in all; needed by a private fleet.

    Raises:
        ConfigurationError: (operator) something lies at `root`, or a private fleet's charges are not told.
        StorageError: (disk, or whoever kept it) the backup is damaged.
    """
    folder = StateFolder(root)
    folder.create()
    deployment: Deployment | None = None
    try:
        listing = unpack(path, root)
        folder.format.rename(root / ".FORMAT")  # not ours to use before it is whole
        settings = load_cloud_settings(folder.settings, None)
        deployment = Deployment(folder, settings, clock=clock, offline=offline)
        if deployment.settings.storage.database:
            raise ConfigurationError(
                "settings.toml names a database of its own",
                hint="bring it and this folder back by their own tools, then: shoal-cloud restore --in-place",
            )
        restored = _begin_anew(deployment, charges, listing.created)
        deployment.close()
        (root / ".FORMAT").rename(folder.format)
    except BaseException:  # an interrupt too: half a folder would be in the way of the next try
        if deployment is not None:
            deployment.close()
        folder.discard()
        raise
    return restored


def restore_in_place(deployment: Deployment, *, charges: int | None = None) -> Restored:
    """Begins another life of a deployment whose database and folder were brought back by other tools than ours: a dump
    of PostgreSQL, a snapshot of a disk.

    Args:
        charges: see `restore_backup`.

    Raises:
        ConfigurationError: (operator) an aggregator runs on the database, or a private fleet's charges are not told.
        StorageError: (disk) the database failed.
    """
    check_unheld(deployment)
    return _begin_anew(deployment, charges, None)


def _begin_anew(deployment: Deployment, charges: int | None, made: float | None) -> Restored:
    now = deployment.clock.now()
    lost = _lost_charges(deployment, charges)
    with deployment.database.transaction() as connection:
        last = newest_entry(connection)
        entries = 0 if last is None else last.seq
        life = reincarnate(connection, now)
        if lost is not None:
            keys = open_ledger_keys(deployment.folder.keys, is_new=last_charge(connection) is None)
            plan = _stated_plan(deployment)
            charge_lost_rounds(connection, keys, plan, lost, incarnation=life.number, now=now)
        body = {"incarnation": life.number, "entries": entries}
        append_audit(connection, "cloud.restored", now, body | ({} if made is None else {"made": made}))
    deployment.repository.outrun(int(now))
    deployment.notary.sign()
    return Restored(life, deployment.keys.targets is not None, entries, made, lost or 0)


def _stated_plan(deployment: Deployment) -> PrivacyPlan:
    """The plan that the settings state, whether or not it is switched on now."""
    settings = deployment.settings.privacy
    return settings.plan() or PrivacyPlan(
        clipping_norm=settings.clipping_norm,
        noise_multiplier=settings.noise_multiplier,
        sampling_rate=settings.sampling_rate,
        epsilon=settings.epsilon,
        delta=settings.delta,
    )


def _lost_charges(deployment: Deployment, charges: int | None) -> int | None:
    """Rounds that were charged after the backup; None for a fleet that never had a privacy budget."""
    with deployment.database.read() as connection:
        last = last_charge(connection)
    anchored = max((anchored_charges(each) for each in deployment.repository.anchors().values()), default=0)
    if last is None and not anchored and deployment.settings.privacy.plan() is None and not charges:
        return None
    return check_charges(0 if last is None else last[0], charges, anchored)
