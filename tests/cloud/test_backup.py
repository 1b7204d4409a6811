"""Backup and restore: a restored cloud accepts no replay and freezes no device, whatever the lost life did."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from msgspec import structs

from cloud_server.audit.check import check_chain
from cloud_server.audit.notary import listed_keys
from cloud_server.backup.archive import LIST, unpack
from cloud_server.backup.backup import make_backup, restore_backup, restore_in_place
from cloud_server.cli import main
from cloud_server.db import schema
from cloud_server.db.audit import load_audit, load_heads
from cloud_server.db.engine import open_database
from cloud_server.db.incarnation import reincarnate
from cloud_server.db.releases import next_version
from cloud_server.deployment import Deployment, initialise
from cloud_server.registry import add_device
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.settings import CloudSettings, StorageSettings
from cloud_server.standby import held_lease
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.tuf_client import ReleaseInfo, check
from tests.cloud.deployment import SteppedClock
from tests.cloud.round_lab import FusedDatabase, Lab, Message
from tests.edge.tiny_release import graph_files, tiny_release
from wire.errors import ConfigurationError, ReleaseError, StorageError
from wire.manifest import RELEASE
from wire.primitives import SigningKey


def publish(repository: TufRepository, version: int, *, model: str = "tiny") -> None:
    manifest, graphs = graph_files(model)
    repository.add_graphs(manifest.graphs_sha256, graphs)
    release, files = tiny_release(version, model=model)
    repository.add_release(release, {k: v for k, v in files.items() if k not in graphs and k != RELEASE})
    repository.set_ring("stable", version)


class Fleet:
    """A deployment in a folder, a device that follows its releases, and whatever cloud it hears."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = SteppedClock()
        self.cloud = initialise(folder / "state", CloudSettings(), clock=self.clock)
        with self.cloud.database.transaction() as connection:
            add_device(connection, "watch", SigningKey.generate().verify_key, now=self.clock.now())
        publish(self.cloud.repository, 1)
        self.backup = folder / "backup"

    def back_up(self) -> None:
        make_backup(self.cloud, self.backup)
        self.clock.seconds += 3600

    def restore(self, *, offline: Path | None = None) -> Deployment:
        """The cloud comes back from the backup, without its offline keys, and the old one is lost."""
        restore_backup(self.backup, self.folder / "restored", offline=offline, clock=self.clock)
        self.cloud.close()
        self.cloud = Deployment.open(self.folder / "restored", clock=self.clock)
        return self.cloud

    def check(self) -> ReleaseInfo:
        """What the device makes of the signed metadata."""
        repository = self.cloud.repository
        root = repository.first_root()
        return check(self.folder / "tuf", root, MemoryFetcher(repository.read), "stable", self.clock)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    made.cloud.close()


# ---- the fleet is not frozen -------------------------------------------------------------------------------


def test_device_that_knows_newer_metadata_follows_the_restored_cloud(fleet: Fleet) -> None:
    fleet.back_up()
    for version in range(2, 6):
        publish(fleet.cloud.repository, version)
    lost = fleet.check()
    assert (lost.release_version, lost.serial) == (5, 5)
    restored = fleet.restore()
    info = fleet.check()
    assert (info.release_version, info.rollback) == (1, True), (
        "what ran after the backup is taken back by a signature"
    )
    assert info.serial > lost.serial
    with restored.database.read() as connection:
        following = next_version(connection)
    assert following > 5, "no number is given a second time"
    publish(restored.repository, following)
    after = fleet.check()
    assert (after.release_version, after.rollback) == (following, False)


def test_same_backup_restored_twice_is_followed_both_times(fleet: Fleet) -> None:
    fleet.back_up()
    fleet.restore()
    publish(fleet.cloud.repository, 1_000_001)
    first = fleet.check()
    fleet.cloud.close()
    fleet.clock.seconds += 3600
    restore_backup(fleet.backup, fleet.folder / "again", clock=fleet.clock)
    fleet.cloud = Deployment.open(fleet.folder / "again", clock=fleet.clock)
    assert fleet.check().serial > first.serial


def test_model_imported_after_the_backup_needs_the_offline_keys(fleet: Fleet) -> None:
    fleet.back_up()
    publish(fleet.cloud.repository, 2, model="other")
    fleet.check()
    offline = fleet.cloud.folder.keys / "offline"
    fleet.restore()
    with pytest.raises(ReleaseError):
        fleet.check()
    fleet.cloud.close()
    restore_backup(fleet.backup, fleet.folder / "again", offline=offline, clock=fleet.clock)
    fleet.cloud = Deployment.open(fleet.folder / "again", clock=fleet.clock)
    assert fleet.check().release_version == 1


def test_epochs_of_messages_downward_go_on_above_the_lost_life(fleet: Fleet) -> None:
    fleet.back_up()
    lost = [fleet.cloud.database.claim_writer() for _ in range(50)]
    assert fleet.restore().database.claim_writer() > max(lost)


def test_restored_cloud_says_so_in_a_whole_chain(fleet: Fleet) -> None:
    fleet.back_up()
    restored = fleet.restore()
    with restored.database.read() as connection:
        keys = listed_keys(restored.repository.audit_keys())
        entries = list(load_audit(connection))
        checked = check_chain(entries, load_heads(connection), keys)
    assert (checked.findings, checked.signed) == ([], len(entries))
    assert entries[-1].kind == "cloud.restored"
    assert entries[-1].facts["incarnation"] == 2
    assert [row.device for row in restored.registry.devices()] == ["watch"]
    assert restored.keys.order.public_bytes == fleet.cloud.keys.order.public_bytes
    assert not (restored.folder.keys / "offline" / "targets.key").exists()


# ---- nothing is accepted twice -----------------------------------------------------------------------------


def restored_lab(lab: Lab, copy: Path) -> None:
    """The lab's service, as another life of a copy of its database."""
    opened = open_database(f"sqlite:///{copy}")
    with opened.transaction() as connection:
        reincarnate(connection, lab.clock.now())
    lab.database = FusedDatabase(opened._engine)
    lab.database.fuse = lab.fuse
    lab.inbox.clear()
    lab.orders.clear()
    lab.restart()


@pytest.mark.parametrize("turns", [1, 4, 9])
def test_answer_to_an_order_of_the_lost_life_is_not_accepted(tmp_path: Path, turns: int) -> None:
    lab = Lab(3, rounds=4, database=f"sqlite:///{tmp_path}/cloud.db")
    for _ in range(turns):
        lab.step()
    lab.database.snapshot(tmp_path / "copy.db")
    known = {row.order_id for row in lab.rows(schema.orders)}
    lab.run()
    lost = [
        (name, answer)
        for name, device in lab.devices.items()
        for answer in device.answers.values()
        if isinstance(answer, Message)
    ]
    gone = {row.update_id for row in lab.rows(schema.updates) if row.order_id not in known}
    assert gone
    restored_lab(lab, tmp_path / "copy.db")
    for _ in range(500):
        if lab.runner.is_finished:
            break
        lab.runner.tick()
        receipts = [lab.send_up(name, message) for name, message in lost]
        stored = {each.update_id.hex() for each in receipts if each.verdict == "stored"}
        assert not stored & gone
        lab.step()
    assert lab.runner.is_finished, "nor does it freeze the run"
    rows = lab.rows(schema.updates)
    assert not {row.update_id for row in rows if row.state == "folded"} & gone
    folded = [row.order_id for row in rows if row.state == "folded"]
    assert len(folded) == len(set(folded)), "one answer to one order"


def test_what_devices_still_hold_for_a_round_of_the_backup_is_folded(tmp_path: Path) -> None:
    lab = Lab(3, rounds=1, evaluate_every=0, strategy="FedAvgM", database=f"sqlite:///{tmp_path}/cloud.db")
    lab.runner.tick()
    # One update is in the backup, two are not.
    lab.deliver_one()
    lab.database.snapshot(tmp_path / "copy.db")
    expected = lab.run().sha256
    held = [
        (name, answer)
        for name, device in lab.devices.items()
        for answer in device.answers.values()
        if isinstance(answer, Message)
    ]
    restored_lab(lab, tmp_path / "copy.db")
    lab.runner.tick()
    # As a device does, sealed anew under its next number.
    for name, message in held:
        lab.devices[name].seq += 1
        message.header = structs.replace(message.header, seq=lab.devices[name].seq)
    assert sorted(lab.send_up(name, message).verdict for name, message in held) == [
        "duplicate",
        "stored",
        "stored",
    ]
    while not lab.runner.is_finished:
        lab.step()
    assert lab.runner.head.sha256 == expected
    assert [row.state for row in lab.rows(schema.updates)] == ["folded"] * 3


@pytest.mark.parametrize("config", [{"mask_groups": []}, {"book": "00"}, {"helped": {}}])
def test_masked_round_under_way_ends_with_the_life_that_asked_for_it(
    tmp_path: Path, config: dict[str, object]
) -> None:
    lab = Lab(3, rounds=1, database=f"sqlite:///{tmp_path}/cloud.db")
    lab.runner.tick()
    now = lab.clock.now()
    with lab.database.transaction() as connection:
        connection.execute(schema.rounds.update().values(config=config))
        reincarnate(connection, now)
    assert {row.deadline for row in (*lab.rows(schema.rounds), *lab.rows(schema.orders))} == {now}


# ---- the file ----------------------------------------------------------------------------------------------


def test_backup_holds_no_offline_key_and_is_for_its_owner(fleet: Fleet) -> None:
    fleet.back_up()
    assert fleet.backup.stat().st_mode & 0o777 == 0o600
    with tarfile.open(fleet.backup) as tar:
        names = tar.getnames()
    assert names[-1] == LIST
    assert "keys/online/order.key" in names
    assert not [name for name in names if "offline" in name or name == "admin.token"]
    assert not list(fleet.folder.glob(".backup*")), "nothing half-made stays"


def test_backup_while_others_write_is_one_moment(fleet: Fleet) -> None:
    other = sqlite3.connect(fleet.cloud.folder.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE meta SET devices_version = 999")
    fleet.back_up()
    other.execute("COMMIT")
    other.close()
    unpack(fleet.backup, fleet.folder / "unpacked")
    copy = sqlite3.connect(fleet.folder / "unpacked" / "cloud.db")
    assert copy.execute("SELECT devices_version FROM meta").fetchone()[0] < 999
    assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    copy.close()


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"SQLite format 3") + 4096] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20_000])


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


def _with(name: str, *, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        path.unlink()
        with tarfile.open(path, "w") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = (
                kind,
                4 if kind == tarfile.REGTYPE else 0,
                "/etc/passwd",
            )
            tar.addfile(member, BytesIO(b"evil"))

    return add


@pytest.mark.parametrize(
    "harm",
    [
        _flip,
        _cut,
        _nothing,
        _with("../evil"),
        _with("/tmp/evil"),
        _with("keys/../../evil"),
        _with("keys/online/x.key", kind=tarfile.SYMTYPE),
        _with("cloud.db"),
    ],
)
def test_backup_that_is_damaged_or_hostile_is_refused_and_leaves_nothing(
    fleet: Fleet, harm: Callable[[Path], None]
) -> None:
    fleet.back_up()
    harm(fleet.backup)
    with pytest.raises(StorageError, match="damaged, or no backup"):
        restore_backup(fleet.backup, fleet.folder / "inner" / "restored", clock=fleet.clock)
    assert not (fleet.folder / "inner" / "restored").exists()
    assert not list(fleet.folder.rglob("evil"))


def test_restore_over_something_is_refused(fleet: Fleet) -> None:
    fleet.back_up()
    with pytest.raises(ConfigurationError, match="not empty"):
        restore_backup(fleet.backup, fleet.cloud.folder.root)


def test_restore_in_place_is_refused_while_an_aggregator_lives(tmp_path: Path) -> None:
    with initialise(tmp_path / "state", CloudSettings()) as cloud:
        running = open_database(f"sqlite:///{cloud.folder.database}")
        lease = held_lease(running, running.claim_writer(), 2.0, is_alive=lambda: True, on_lost=list)
        with lease, pytest.raises(ConfigurationError, match="an aggregator runs"):
            restore_in_place(cloud)
        running.close()
        assert restore_in_place(cloud).incarnation.number == 2


def test_backup_of_artefacts_elsewhere_names_where_they_are(tmp_path: Path) -> None:
    settings = CloudSettings(storage=StorageSettings(artefacts="memory:"))
    with initialise(tmp_path / "state", settings) as cloud:
        listing = make_backup(cloud, tmp_path / "backup")
    assert listing.artefacts == "memory:", "what is not in it is named"


def test_commands_back_up_and_restore(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_STATE", str(tmp_path / "state"))
    assert main(["init"]) == 0
    place = str(tmp_path / "backup")
    capsys.readouterr()
    assert main(["backup", place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["incarnation"] == 1
    assert main(["backup", place]) == 2
    assert main(["restore", place, "--state", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["incarnation"] == 2
    assert main(["audit", "verify", "--state", str(tmp_path / "new")]) == 0
    assert main(["status", "--state", str(tmp_path / "new"), "--json"]) == 0
