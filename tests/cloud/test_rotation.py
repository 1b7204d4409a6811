"""Keys that are replaced: by the command, by generations on the disk, by a signer that is no file; expiry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner

from cloud_server.cli import main
from cloud_server.deployment import Deployment
from cloud_server.keys import (
    LEARN_SECONDS,
    OVERLAP_SECONDS,
    SIGNERS,
    CloudKeys,
    KeyFolder,
    add_generation,
    init_keys,
)
from cloud_server.release.expiry import ExpiryAlarm, judge_expiries
from cloud_server.release.tuf_signing import TufExpiry, public_key
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.tuf_client import check
from tests.cloud.deployment import SteppedClock
from wire.errors import ConfigurationError, StorageError
from wire.primitives import KemPrivateKey, SigningKey

DAY = 86_400.0
ROLES = ("targets", "parameters", "keys", "rings", "snapshot", "timestamp")


class Shoal:
    """`shoal-cloud` on one state folder, and a device that checks what it published."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.state = folder / "state"
        self._capsys = capsys

    def __call__(self, *words: str) -> Any:
        """Runs a command; returns its JSON, or its error text when it fails."""
        self._capsys.readouterr()
        code = main([*words, "--state", str(self.state)])
        captured = self._capsys.readouterr()
        if code:
            return captured.err
        return json.loads(captured.out) if "--json" in words else captured.out

    def check(self) -> Any:
        with Deployment.open(self.state) as deployment:
            repository = deployment.repository
            fetcher = MemoryFetcher(lambda path: repository.read(path))
            return check(self.folder / "device", repository.first_root(), fetcher, "stable", deployment.clock)


@pytest.fixture
def shoal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shoal:
    made = Shoal(tmp_path, capsys)
    made("init")
    made.check()
    return made


# ---- generations on the disk ----


def folder_of_keys(tmp_path: Path) -> Path:
    init_keys(tmp_path / "keys")
    return tmp_path / "keys"


def test_new_kem_key_is_sealed_to_at_once_and_the_old_one_opens_for_the_overlap(tmp_path: Path) -> None:
    folder = folder_of_keys(tmp_path)
    old = CloudKeys.load(folder).kem[0]
    new = KemPrivateKey.generate()
    add_generation(folder, "kem", new, since=1000.0)
    ids = [key.key_id for key in CloudKeys.load(folder, now=1000.0).kem]
    assert ids == [new.key_id, old.key_id]
    assert len(CloudKeys.load(folder, now=999.0 + OVERLAP_SECONDS).kem) == 2
    assert [key.key_id for key in CloudKeys.load(folder, now=1000.0 + OVERLAP_SECONDS).kem] == [new.key_id]


def test_new_order_key_is_listed_first_and_signs_when_devices_had_time_to_hear_of_it(tmp_path: Path) -> None:
    folder = folder_of_keys(tmp_path)
    old = CloudKeys.load(folder).order
    new = SigningKey.generate()
    add_generation(folder, "order", new, since=1000.0)
    early = CloudKeys.load(folder, now=1000.0)
    assert (early.order.key_id, [key.key_id for key in early.other_orders]) == (old.key_id, [new.key_id])
    assert early.changes_at == 1000.0 + LEARN_SECONDS
    late = CloudKeys.load(folder, now=early.changes_at)
    assert (late.order.key_id, [key.key_id for key in late.other_orders]) == (new.key_id, [old.key_id])
    end = CloudKeys.load(folder, now=late.changes_at)
    assert (end.order.key_id, end.other_orders) == (new.key_id, ())


def test_key_folder_reads_again_when_a_file_came_or_time_passed(tmp_path: Path) -> None:
    folder, clock = folder_of_keys(tmp_path), SteppedClock(5000.0)
    keys = KeyFolder(folder, clock)
    first = keys()
    assert keys() is first
    add_generation(folder, "order", SigningKey.generate(), since=clock.now())
    second = keys()
    assert second is not first
    assert second.order.key_id == first.order.key_id
    assert keys() is second
    clock.seconds += LEARN_SECONDS
    assert keys().order.key_id == second.other_orders[0].key_id


def test_name_of_one_key_is_never_taken_for_a_generation_of_another(tmp_path: Path) -> None:
    folder = folder_of_keys(tmp_path)
    before = CloudKeys.load(folder)
    (folder / "online" / "order-old.key").write_text("not a key")
    (folder / "offline" / "root-1-x.key").write_text("not a key")
    assert [key.key_id for key in CloudKeys.load(folder).root] == [key.key_id for key in before.root]
    add_generation(folder / "offline", "root-1", SigningKey.generate(), since=1.0)
    after = CloudKeys.load(folder)
    assert [key.key_id for key in after.root[1:]] == [key.key_id for key in before.root[1:]]
    assert before.root[0].key_id in {key.key_id for key in after.spare}


@pytest.mark.parametrize("content", ["[]", "{", '{"a":1}'])
def test_signers_that_cannot_be_read_are_named(tmp_path: Path, content: str) -> None:
    folder = folder_of_keys(tmp_path)
    (folder / SIGNERS).write_text(content)
    (folder / SIGNERS).chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"signers\.json"):
        CloudKeys.load(folder)


# ---- the command ----


@pytest.mark.parametrize("role", ROLES)
def test_role_is_rotated_and_a_device_follows(shoal: Shoal, role: str) -> None:
    before = {row["key_id"] for row in shoal("keys", "show", "--json") if row["role"] == role}
    done = shoal("keys", "rotate", role, "--json")
    rows = shoal("keys", "show", "--json")
    counting = {row["key_id"] for row in rows if row["role"] == role}
    assert counting == {done["key_id"]}
    assert not counting & before
    assert before <= {row["key_id"] for row in rows if row["state"] == "replaced"}
    assert shoal.check().keys.kem


def test_every_share_of_root_is_rotated_and_a_device_follows(shoal: Shoal) -> None:
    before = {row["key_id"] for row in shoal("keys", "show", "--json") if row["role"] == "root"}
    for share in ("1", "2", "3"):
        shoal("keys", "rotate", "root", "--share", share, "--json")
        assert shoal.check().keys.kem
    after = {row["key_id"] for row in shoal("keys", "show", "--json") if row["role"] == "root"}
    assert len(after) == 3
    assert not after & before


def test_lost_share_is_replaced_by_the_other_two(shoal: Shoal) -> None:
    lost = public_key(CloudKeys.load(shoal.state / "keys").root[0]).keyid
    (shoal.state / "keys" / "offline" / "root-1.key").unlink()
    assert "--replaces" in shoal("keys", "rotate", "root", "--share", "1")
    assert (
        shoal("keys", "rotate", "root", "--share", "1", "--replaces", lost[:12], "--json")["key_id"] != lost
    )
    assert shoal.check().keys.kem


def test_one_share_alone_rotates_nothing_and_leaves_nothing(shoal: Shoal) -> None:
    offline = shoal.state / "keys" / "offline"
    for share in (2, 3):
        (offline / f"root-{share}.key").unlink()
    before = sorted(path.name for path in shoal.state.rglob("*") if path.name != "locks")
    assert "too few root shares" in shoal("keys", "rotate", "root", "--share", "1")
    assert "too few root shares" in shoal("keys", "rotate", "timestamp")
    assert sorted(path.name for path in shoal.state.rglob("*") if path.name != "locks") == before
    assert shoal.check().keys.kem


def test_everything_online_goes_on_without_the_offline_keys(shoal: Shoal) -> None:
    (shoal.state / "keys" / "offline").rename(shoal.folder / "stick")
    for name in ("order", "kem"):
        shoal("keys", "rotate", name, "--json")
    found = shoal.check()
    assert (len(found.keys.kem), len(found.keys.orders)) == (2, 2)
    assert [row["role"] for row in shoal("keys", "expiry", "--json") if row["is_due"]] == []
    assert {row["place"] for row in shoal("keys", "show", "--json") if row["role"] == "root"} == {"away"}
    assert "is not here" in shoal("keys", "rotate", "rings")
    assert "is not here" in shoal("keys", "sign", "targets")


def test_offline_keys_may_stay_on_a_stick(shoal: Shoal) -> None:
    stick = shoal.folder / "stick"
    (shoal.state / "keys" / "offline").rename(stick)
    shoal("keys", "rotate", "rings", "--offline", str(stick), "--json")
    shoal("keys", "rotate", "targets", "--offline", str(stick), "--json")
    assert (stick / "targets-2.key").exists()
    for role in ("root", "targets"):
        shoal("keys", "sign", role, "--offline", str(stick), "--json")
    assert shoal.check().keys.kem
    assert not (shoal.state / "keys" / "offline").exists()


@pytest.mark.parametrize("name", ["order", "kem"])
def test_stolen_online_key_counts_no_more_at_once(shoal: Shoal, name: str) -> None:
    keys = CloudKeys.load(shoal.state / "keys")
    stolen = keys.order.key_id if name == "order" else keys.kem[0].key_id
    shoal("keys", "rotate", name, "--stolen", "--json")
    found = shoal.check().keys
    assert stolen not in {key for key, *_ in (*found.kem, *found.orders)}
    now = CloudKeys.load(shoal.state / "keys", now=2e9)
    assert stolen not in {now.order.key_id, *(key.key_id for key in now.kem)}
    assert len(list((shoal.state / "keys" / "retired").iterdir())) == 1


def test_kem_key_of_another_algorithm_takes_over(shoal: Shoal) -> None:
    shoal("keys", "rotate", "kem", "--kem", "mlkem768-x25519", "--json")
    assert [algorithm for _, algorithm, _ in shoal.check().keys.kem] == ["mlkem768-x25519", "x25519"]


def test_key_that_is_no_file_signs_by_its_uri(shoal: Shoal) -> None:
    """`file2:` of securesystemslib stands for an HSM or a KMS: another kind of key, behind the same seam."""
    signer = CryptoSigner.generate_ecdsa()
    secret, public = shoal.folder / "elsewhere.pem", shoal.folder / "public.json"
    secret.write_bytes(signer.private_bytes)
    public.write_text(json.dumps({"keyid": signer.public_key.keyid, **signer.public_key.to_dict()}))
    words = ("--signer", f"file2:{secret}", "--public-key", str(public), "--json")
    assert shoal("keys", "rotate", "targets", *words)["key_id"] == signer.public_key.keyid
    shoal("keys", "sign", "targets")
    shoal("keys", "rotate", "rings", "--json")
    assert shoal.check().keys.kem
    rows = shoal("keys", "show", "--json")
    assert [row["place"] for row in rows if row["role"] == "targets"] == [f"file2:{secret}"]
    secret.unlink()
    assert "does not sign" in shoal("keys", "sign", "targets")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("root",), "--share"),
        (("timestamp", "--share", "1"), "--share"),
        (("targets", "--signer", "hsm:1"), "--public-key"),
        (("targets", "--replaces", "zz"), "begin with"),
    ],
)
def test_rotation_with_arguments_that_do_not_go_together_is_refused(
    shoal: Shoal, words: tuple[str, ...], says: str
) -> None:
    assert says in shoal("keys", "rotate", *words)
    assert shoal.check().keys.kem


def test_public_key_that_is_none_is_refused(shoal: Shoal) -> None:
    place = shoal.folder / "public.json"
    place.write_text('{"keyid": 1}')
    assert "not a public key" in shoal(
        "keys", "rotate", "targets", "--signer", "hsm:1", "--public-key", str(place)
    )


def test_keys_of_a_ceremony_elsewhere_begin_a_deployment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "init", str(tmp_path / "ceremony"), "--kem", "mlkem768-x25519"]) == 0
    made = CloudKeys.load(tmp_path / "ceremony")
    shutil.move(tmp_path / "ceremony" / "offline", tmp_path / "stick")
    there = Shoal(tmp_path, capsys)
    assert "root" in there("init", "--keys", str(tmp_path / "ceremony"))
    shutil.rmtree(there.state, ignore_errors=True)
    shutil.move(tmp_path / "stick", tmp_path / "ceremony" / "offline")
    there("init", "--keys", str(tmp_path / "ceremony"))
    assert there.check().keys.kem == (
        (made.kem[0].key_id, "mlkem768-x25519", made.kem[0].public_key.public_bytes),
    )


# ---- a rotation that stops, and expiry ----


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_rotation_that_stopped_after_the_root_is_finished_by_the_service(
    shoal: Shoal, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise StorageError("the machine died")

    with Deployment.open(shoal.state) as deployment, monkeypatch.context() as patch:
        patch.setattr(deployment.repository, "_publish", dies)
        new = SigningKey.generate()
        add_generation(shoal.state / "keys", role, new, since=1.0)
        with pytest.raises(StorageError):
            deployment.repository.rotate(role, public_key(new))
    with pytest.raises(Exception, match="verify"):
        shoal.check()
    with Deployment.open(shoal.state) as deployment:
        assert deployment.repository.refresh()
        assert not deployment.repository.refresh()
    assert shoal.check().keys.kem


def test_offline_roles_alarm_weeks_before_they_end() -> None:
    lives, now = TufExpiry(), 1e9
    ends = {
        "root": now + 59 * DAY,
        "targets": now + 31 * DAY,
        "timestamp": now + 0.6 * DAY,
        "rings": now + 14 * DAY,
    }
    judged = judge_expiries(ends, lives, now)
    assert [each.role for each in judged] == ["timestamp", "rings", "targets", "root"]
    assert {each.role for each in judged if each.is_due} == {"rings", "root"}
    assert "keys sign root" in next(each.what_to_do for each in judged if each.role == "root")


def test_short_life_of_the_settings_is_no_alarm_from_its_first_day() -> None:
    lives, now = TufExpiry(root=20.0, targets=10.0), 1e9
    assert not any(
        each.is_due
        for each in judge_expiries({"root": now + 20 * DAY, "targets": now + 10 * DAY}, lives, now)
    )


def test_alarm_speaks_once_a_day_and_role(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = SteppedClock()
    from cloud_server.artefacts import Artefacts
    from cloud_server.release.tuf_repository import TufRepository

    repository = TufRepository(Artefacts.in_memory(), CloudKeys.from_seed(b"alarm"), clock)
    repository.init(online_keys=b"{}")
    alarm = ExpiryAlarm(repository, clock)
    assert alarm.tick() == []
    spoken = []
    for _ in range(400):
        clock.seconds += DAY / 2
        repository.refresh()
        spoken += alarm.tick()
        if clock.seconds > SteppedClock().seconds + 160 * DAY:
            break
    assert set(spoken) == {"targets"}
    assert 9 <= len(spoken) <= 12
    assert "signature_ends_soon" in caplog.text


Spoil = Callable[[Path], None]
