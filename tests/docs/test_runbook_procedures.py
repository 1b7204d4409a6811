"""The procedures of docs/runbook.md for keys that are lost or stolen, run as they are written there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from cloud_server.backup.backup import make_backup, restore_backup
from cloud_server.cli import main
from cloud_server.deployment import Deployment
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_signing import public_key
from edge_agent.enrolment.enrol import renew
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.tuf_client import ReleaseInfo, check, find_authorities
from tests.cloud.test_authorities import Cloud, Machine, cloud, machine, trusted  # noqa: F401
from tests.cloud.test_authorities import check as come_back
from tests.docs.test_runbook import SECTIONS
from wire.errors import EnrolmentError, ReleaseError, StorageError
from wire.primitives import certificate_fingerprints


def procedure(section: str, key: str) -> list[list[str]]:
    """The commands in a row of the runbook's tables, word by word without `shoal-cloud`."""
    text = dict(SECTIONS)[f"Keys that are {section}"]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line[:2] == "| "
    ]
    (row,) = [row for row in rows if row[0].strip("| ") == key]
    found = re.findall(r"`shoal-cloud ([^`]*)`", row[2])
    assert found, row
    return [shlex.split(each) for each in found]


class Fleet:
    """`shoal-cloud` on one state folder, and a device that checks what it published."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = folder / "state"
        self.device = folder / "device"
        self._capsys = capsys

    def __call__(self, *words: str) -> Any:
        """Runs a command, which must succeed; returns what it printed."""
        self._capsys.readouterr()
        code = main([*words, "--state", str(self.state)])
        captured = self._capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out) if "--json" in words else captured.out

    def keys(self) -> CloudKeys:
        return CloudKeys.load(self.state / "keys")

    def check(self, of: Path | None = None) -> ReleaseInfo:
        """A device's check of this deployment, or of what somebody else made of it."""
        with Deployment.open(of or self.state) as deployment:
            first = deployment.repository.first_root()
            return check(
                self.device, first, MemoryFetcher(deployment.repository.read), "stable", deployment.clock
            )


@pytest.fixture
def fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fleet:
    made = Fleet(tmp_path, capsys)
    made("init")
    made.check()
    return made


# ---- lost ----


def test_lost_root_share(fleet: Fleet) -> None:
    lost = public_key(fleet.keys().root[0]).keyid
    (fleet.state / "keys" / "offline" / "root-1.key").unlink()
    for words in procedure("lost", "one root share"):
        fleet(*[{"KEY": lost[:16]}.get(word, word) for word in words])
    assert lost not in {row["key_id"] for row in fleet("keys", "show", "--json") if row["state"] == "counts"}
    assert fleet.check().keys.kem


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("targets", "offline/targets.key"),
        ("an online role of TUF", "online/rings.key"),
        ("order", "online/order.key"),
        ("KEM", "online/kem-1.key"),
    ],
)
def test_lost_key_is_replaced_and_a_device_follows(fleet: Fleet, key: str, file: str) -> None:
    (fleet.state / "keys" / file).unlink()
    if file.startswith("online"):
        with pytest.raises(StorageError):
            fleet.keys()
    for words in procedure("lost", key):
        fleet(*words)
    keys = fleet.keys()
    found = fleet.check().keys
    assert [each for each, *_ in found.kem] == [each.key_id for each in keys.kem]
    assert keys.order.key_id in {each for each, _ in found.orders}
    fleet("keys", "rotate", "rings")  # what signs rings and graphs is here again


def test_lost_authority_is_replaced_and_a_device_comes_back(
    cloud: Cloud,  # noqa: F811
    tmp_path: Path,
) -> None:
    device = cloud.enrol("dev", tmp_path)
    (cloud.deployment.folder.authority / "ca.key").unlink()
    with pytest.raises(StorageError):
        cloud.front.follow()
    for words in procedure("lost", "CA"):
        cloud(*words[1:])
    back = come_back(device)
    assert certificate_fingerprints(back.ca_pem) == trusted(cloud)
    renew(back)


def test_device_that_lost_its_keys_comes_under_another_name(
    cloud: Cloud,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from edge_agent.enrolment.enrol import enrol
    from process.clock import SystemClock

    lost = cloud.enrol("gateway-1", tmp_path)
    url = f"https://127.0.0.1:{cloud.front.public_port}"
    for words in procedure("lost", "a device's"):
        capsys.readouterr()
        more = ["--url", url] if words[1] == "add" else []
        assert main([*words, *more, "--state", str(cloud.deployment.folder.root)]) == 0
    token = capsys.readouterr().out.strip()
    assert enrol(token, tmp_path / "again", clock=SystemClock()).device == "gateway-1b"
    with pytest.raises(EnrolmentError):
        renew(lost)


def test_operator_gets_another_token(fleet: Fleet) -> None:
    before = fleet("user", "add", "ann", "--role", "operator").strip()
    for words in procedure("lost", "an operator's token"):
        after = fleet(*[{"NAME": "ann"}.get(word, word) for word in words]).strip()
    assert after
    assert after != before


# ---- stolen ----


@pytest.mark.parametrize(
    "key", ["one root share", "targets", "parameters, keys, rings, snapshot, timestamp", "order", "KEM"]
)
def test_stolen_key_counts_no_more(fleet: Fleet, key: str) -> None:
    before = {row["key_id"] for row in fleet("keys", "show", "--json") if row["state"] == "counts"}
    announced = announced_keys(fleet)
    replaced = set()
    for words in procedure("stolen", key):
        name, share = words[2], words[4] if "--share" in words else ""
        keys = fleet.keys()
        stolen = keys.root[int(share) - 1] if share else None
        if name in ("order", "kem"):
            replaced.add((keys.order if name == "order" else keys.kem[0]).key_id.hex())
        else:
            replaced.add(public_key(stolen or getattr(keys, name)).keyid)
        fleet(*words)
    assert replaced <= before
    after = {row["key_id"] for row in fleet("keys", "show", "--json") if row["state"] in ("counts", "listed")}
    assert not replaced & after
    found = fleet.check().keys
    assert not replaced & {each.hex() for each, *_ in (*found.kem, *found.orders)}
    assert found.version == announced_keys(fleet) != announced, "running devices are told at once"


def announced_keys(fleet: Fleet) -> int:
    """What the service would announce now, a second after the command."""
    with Deployment.open(fleet.state) as deployment:
        return deployment.publisher.announcement("stable").keys_version


def test_stolen_device_is_out(
    cloud: Cloud,  # noqa: F811
    tmp_path: Path,
) -> None:
    device = cloud.enrol("gateway-1", tmp_path)
    block = re.search(r"```console\n(.*?)```", dict(SECTIONS)["A stolen device"], re.DOTALL)
    assert block
    for line in block[1].splitlines():
        words = shlex.split(line)[1:]
        assert main([*words, "--state", str(cloud.deployment.folder.root)]) == 0
    with pytest.raises(EnrolmentError) as caught:
        renew(device)
    assert caught.value.facts["code"] == "revoked"


def test_stolen_backup_is_worth_nothing_after_its_procedure(fleet: Fleet, tmp_path: Path) -> None:
    """The thief brings it to life; a device that has looked since believes nothing that he signs."""
    with Deployment.open(fleet.state) as deployment:
        make_backup(deployment, tmp_path / "stolen")
        first, thief_ca = deployment.repository.first_root(), deployment.authority.fingerprint
    restore_backup(tmp_path / "stolen", tmp_path / "thief")
    thief = CloudKeys.load(tmp_path / "thief" / "keys")
    for words in procedure("stolen", "a backup"):
        fleet(*words)
    found = fleet.check()
    with pytest.raises(ReleaseError):
        fleet.check(tmp_path / "thief")
    assert thief.order.key_id not in {each for each, _ in found.keys.orders}
    assert not {each.key_id for each in thief.kem} & {each for each, *_ in found.keys.kem}
    with Deployment.open(fleet.state) as deployment:
        fetcher = MemoryFetcher(deployment.repository.read)
        authorities = find_authorities(fleet.device, first, fetcher, deployment.clock, b"")
    assert authorities is not None
    assert bytes.fromhex(thief_ca) not in certificate_fingerprints(authorities)
    assert fleet.check().keys.kem
