"""The register: who may speak, who is here, and that changes elsewhere are seen at once."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_server.db.audit import load_audit, verify_audit
from cloud_server.db.devices import load_revoked_serials
from cloud_server.db.erasure import erase_device
from cloud_server.registry import Registry, node_id_of
from tests.cloud.deployment import NOW, Deployment, Newcomer
from wire.errors import ConfigurationError, PeerError, StorageError
from wire.messages import Birth


def let_in(deployment: Deployment, device: str) -> Newcomer:
    newcomer = Newcomer(device)
    deployment.enrolment.enrol(newcomer.request(deployment.mint(device)))
    return newcomer


def birth(status: str = "online", boot: int = 1, release: int = 0) -> Birth:
    return Birth(
        status=status,  # type: ignore[arg-type]
        boot_id=bytes([boot]) * 16,
        agent_version="0.1.0",
        wire_versions=(1, 1),
        release_version=release,
    )


@pytest.fixture
def registry(deployment: Deployment) -> Registry:
    for name in ("a", "b"):
        let_in(deployment, name)
    return deployment.registry


def test_devices_are_found_by_name_node_and_key(deployment: Deployment) -> None:
    newcomer = let_in(deployment, "a")
    registry = deployment.registry
    node = registry.node_id("a")
    assert node == node_id_of(newcomer.update_key.verify_key)
    assert 0 < node < 2**63
    assert registry.device_of(node) == "a"
    signer = registry.signers()[newcomer.update_key.key_id]
    assert (signer.device, signer.key) == ("a", newcomer.update_key.verify_key)
    assert registry.max_examples("a") == 500


def test_device_that_is_not_there_is_an_error_with_a_hint(registry: Registry) -> None:
    with pytest.raises(ConfigurationError) as caught:
        registry.show("ghost")
    assert "device list" in caught.value.hint
    with pytest.raises(ConfigurationError):
        registry.device_of(12345)
    assert registry.status("ghost") == ""


def test_presence_follows_births_goodbyes_and_wills(registry: Registry) -> None:
    assert registry.present() == {}
    assert registry.note_birth("a", birth())
    assert registry.note_birth("b", birth())
    assert not registry.note_birth("b", birth())
    assert registry.present() == {"a": registry.node_id("a"), "b": registry.node_id("b")}
    assert registry.note_birth("a", birth("offline"))
    assert registry.note_birth("b", birth("lost"))
    assert not registry.note_birth("b", birth("offline"))
    assert registry.present() == {}


def test_will_of_an_earlier_boot_does_not_end_the_present_one(registry: Registry) -> None:
    registry.note_birth("a", birth(boot=1))
    registry.note_birth("a", birth(boot=2))
    registry.note_birth("a", birth("lost", boot=1))
    assert list(registry.present()) == ["a"]


def test_device_that_nobody_saw_leave_is_back_once_for_each_session(registry: Registry) -> None:
    def come(device: str, **facts: Any) -> bool:
        is_back = registry.is_back(device, birth(**facts))
        registry.note_birth(device, birth(**facts))
        return is_back

    assert not come("a")  # its first
    assert come("a")  # a new session, and no will before it
    assert not come("a", release=7)  # a new release, said in the middle of a session
    assert come("a", release=7)
    assert come("a", release=7, boot=2)
    assert not come("a", status="lost", boot=2)
    assert not come("a", release=7, boot=2)  # it came, and everybody saw it go


def test_birth_that_the_broker_kept_is_no_return_to_a_service_that_started(
    deployment: Deployment, registry: Registry
) -> None:
    registry.note_birth("a", birth())
    registry.write_presence()
    after = Registry(deployment.database, deployment.clock)
    assert not after.is_back("a", birth())
    assert after.is_back("a", birth(boot=2))
    after.note_birth("a", birth())
    assert after.is_back("a", birth())


def test_device_that_speaks_again_is_here_again(registry: Registry, deployment: Deployment) -> None:
    registry.note_birth("a", birth())
    registry.note_lost("a")
    assert registry.present() == {}
    assert registry.note_seen("a", release_version=4)
    assert not registry.note_seen("a", release_version=4)
    assert list(registry.present()) == ["a"]
    assert registry.presence()["a"].release_version == 4
    registry.note_seen("b", release_version=4)
    assert "b" not in registry.presence()
    registry.write_presence()
    assert Registry(deployment.database, deployment.clock).presence()["a"].status == "online"


def test_heartbeats_move_last_seen_on_the_disk_once_a_minute(
    registry: Registry, deployment: Deployment
) -> None:
    def on_disk() -> float:
        registry.write_presence()
        return Registry(deployment.database, deployment.clock).presence()["a"].last_seen

    registry.note_birth("a", birth(release=1))
    deployment.clock.seconds += 30
    registry.note_seen("a", 1)
    assert on_disk() == NOW
    deployment.clock.seconds += 31
    registry.note_seen("a", 1)
    assert on_disk() == NOW + 61


def test_presence_of_many_devices_is_written_in_one_commit(
    registry: Registry, deployment: Deployment
) -> None:
    commits: list[float] = []
    deployment.database.on_commit = commits.append
    for number in range(3):
        registry.note_birth("a", birth(release=number))
        registry.note_birth("b", birth("offline" if number == 2 else "online"))
    assert commits == []
    registry.write_presence()
    registry.write_presence()
    assert len(commits) == 1
    found = Registry(deployment.database, deployment.clock).presence()
    assert (found["a"].release_version, found["b"].status) == (2, "offline")


def test_presence_of_a_device_whose_name_was_erased_is_left_out(
    registry: Registry, deployment: Deployment
) -> None:
    registry.note_birth("a", birth())
    registry.note_birth("b", birth())
    registry.revoke("a")
    row = registry.show("a")
    with deployment.database.transaction() as connection:
        erase_device(connection, row)
    registry.write_presence()
    assert list(Registry(deployment.database, deployment.clock).presence()) == ["b"]


def test_birth_of_an_unknown_or_revoked_device_is_refused(registry: Registry) -> None:
    registry.revoke("a")
    for name in ("a", "ghost"):
        with pytest.raises(PeerError):
            registry.note_birth(name, birth())


def test_revoked_device_is_forgotten_everywhere(registry: Registry, deployment: Deployment) -> None:
    registry.note_birth("a", birth())
    key = next(key for key, signer in registry.signers().items() if signer.device == "a")
    serial = registry.show("a").certificate_serial
    registry.revoke("a", "stolen")
    assert key not in registry.signers()
    assert registry.present() == {}
    assert (registry.status("a"), registry.show("a").reason) == ("revoked", "stolen")
    with deployment.database.read() as connection:
        assert load_revoked_serials(connection, NOW) == [serial]
        assert load_revoked_serials(connection, NOW + 8 * 86_400.0) == []


def test_revocation_by_another_process_is_seen_by_the_next_call(
    registry: Registry, deployment: Deployment
) -> None:
    registry.note_birth("a", birth())
    assert "a" in registry.present()
    Registry(deployment.database, deployment.clock).revoke("a")
    assert "a" not in registry.present()
    assert "a" not in {signer.device for signer in registry.signers().values()}


def test_signers_are_the_same_object_until_something_changes(registry: Registry) -> None:
    first = registry.signers()
    assert registry.signers() is first
    registry.rename("a", "left wrist")
    assert registry.signers() is not first
    assert registry.show("a").label == "left wrist"


def test_quarantined_device_may_speak_but_takes_no_part(registry: Registry) -> None:
    registry.note_birth("a", birth())
    registry.quarantine("a", "odd")
    assert registry.present() == {}
    assert "a" in {signer.device for signer in registry.signers().values()}
    registry.approve("a")
    assert list(registry.present()) == ["a"]


def test_revocation_is_for_ever(registry: Registry) -> None:
    registry.revoke("a")
    for change in (registry.approve, registry.quarantine):
        with pytest.raises(ConfigurationError, match="revoked"):
            change("a")


@pytest.mark.parametrize("label", ["x" * 129, "a\nb", "\x1b[2J"])
def test_label_that_cannot_be_shown_is_refused(registry: Registry, label: str) -> None:
    with pytest.raises(ConfigurationError):
        registry.rename("a", label)


def test_changes_are_in_the_chain_without_names(registry: Registry, deployment: Deployment) -> None:
    registry.quarantine("a", "odd")
    registry.approve("a")
    registry.rename("a", "left wrist")
    registry.revoke("a")
    with deployment.database.read() as connection:
        kinds = [entry.kind for entry in load_audit(connection, after=4)]
        bodies = "".join(entry.body for entry in load_audit(connection))
        assert verify_audit(connection) == 8
    assert kinds == ["device.quarantined", "device.approved", "device.renamed", "device.revoked"]
    assert "wrist" not in bodies


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("UPDATE audit SET body = replace(body, 'device', 'devize') WHERE seq = 2", "entry 2 was changed"),
        ("UPDATE audit SET at = at + 1 WHERE seq = 3", "entry 3 was changed"),
        ("DELETE FROM audit WHERE seq = 2", "entry 2 is missing"),
        ("UPDATE audit SET kind = 'x' WHERE seq = 4", "entry 4 was changed"),
    ],
)
def test_damage_of_the_chain_is_named(
    registry: Registry, deployment: Deployment, damage: str, message: str
) -> None:
    with deployment.database.transaction() as connection:
        assert verify_audit(connection) == 4
        connection.exec_driver_sql(damage)
    with deployment.database.read() as connection, pytest.raises(StorageError, match=message):
        verify_audit(connection)


def whole(registry: Registry, deployment: Deployment) -> None:
    """What the register remembers is what one that reads everything anew finds."""
    fresh = Registry(deployment.database, deployment.clock)
    assert registry.devices() == fresh.devices()
    assert [row.device for row in registry.devices()] == sorted(row.device for row in registry.devices())
    assert {key: signer.device for key, signer in registry.signers().items()} == {
        key: signer.device for key, signer in fresh.signers().items()
    }
    assert [registry.device_of(row.node_id) for row in registry.devices()] == [
        row.device for row in registry.devices()
    ]


def test_register_that_reads_changes_alone_is_the_one_that_reads_all(deployment: Deployment) -> None:
    registry = deployment.registry
    elsewhere = Registry(deployment.database, deployment.clock)
    for name in ("m", "c", "x", "a"):
        let_in(deployment, name)
        whole(registry, deployment)
    elsewhere.quarantine("c")
    elsewhere.rename("m", "at the door")
    whole(registry, deployment)
    assert (registry.status("c"), registry.show("m").label) == ("quarantined", "at the door")
    elsewhere.revoke("x", "stolen")
    whole(registry, deployment)
    assert "x" not in {signer.device for signer in registry.signers().values()}
    gone = elsewhere.show("x")
    with deployment.database.transaction() as connection:
        erase_device(connection, gone)
    let_in(deployment, "n")  # as many as before the erasure, and one more
    whole(registry, deployment)
    assert registry.status("x") == ""


def test_enrolment_reads_nothing_of_the_devices_that_did_not_change(deployment: Deployment) -> None:
    for name in ("a", "b"):
        let_in(deployment, name)
    registry = deployment.registry
    before, signers = {row.device: row for row in registry.devices()}, dict(registry.signers())
    let_in(deployment, "c")
    after = {row.device: row for row in registry.devices()}
    assert len(after) == 3
    assert all(after[name] is row for name, row in before.items())
    assert all(registry.signers()[key] is signer for key, signer in signers.items())
