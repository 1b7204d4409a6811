"""A certificate authority that is replaced: by a second one beside it, or at once because it was stolen."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from cloud_server.broker import open_broker
from cloud_server.cli import main
from cloud_server.deployment import Deployment, initialise
from cloud_server.enrolment.authorities import (
    AuthorityFolder,
    add_authority,
    load_authorities,
    retire_authorities,
)
from cloud_server.enrolment.ca import CertificateAuthority
from cloud_server.enrolment.tokens import mint_token
from cloud_server.https import HttpsFront
from cloud_server.keys import LEARN_SECONDS, OVERLAP_SECONDS
from cloud_server.release.authority_watch import AuthorityWatch
from cloud_server.settings import BrokerSettings, CloudSettings, EnrolmentSettings, ListenSettings
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.enrol import enrol, renew
from edge_agent.enrolment.https import verified_context
from edge_agent.enrolment.identity import Identity
from edge_agent.release.child import Request, _check_with_trust
from edge_agent.release.fetcher import HttpsFetcher, MemoryFetcher
from edge_agent.release.tuf_client import find_authorities
from process.clock import SystemClock
from tests.cloud.deployment import NOW, SteppedClock
from tests.cloud.deployment import Deployment as Books
from tests.cloud.test_revocation import Member
from tests.transport.conftest import needs_mosquitto
from wire.errors import ConfigurationError, EnrolmentError, ReleaseError, TransportError, TrustError
from wire.primitives import certificate_fingerprints, generate_tls_key, make_csr, write_private
from wire.transport import Connected, Disconnected

DAY = 86_400.0
REQUEST = Request(current_version=0)


# ---- the folder ----


def test_second_authority_counts_at_once_and_signs_after_a_day(tmp_path: Path) -> None:
    clock = SteppedClock()
    old = CertificateAuthority.create(tmp_path / "ca", name="one", now=NOW)
    folder = AuthorityFolder(tmp_path / "ca", clock)
    alone = folder()
    assert (alone.issuing.fingerprint, folder() is alone) == (old.fingerprint, True)
    new = add_authority(tmp_path / "ca", name="two", now=NOW)
    both = folder()
    assert [each.fingerprint for each in both.trusted] == [new.fingerprint, old.fingerprint]
    assert (both.issuing.fingerprint, both.door.fingerprint) == (old.fingerprint, old.fingerprint)
    clock.seconds += LEARN_SECONDS
    later = folder()
    assert (later.issuing.fingerprint, later.door.fingerprint) == (new.fingerprint, old.fingerprint)
    assert later.may_retire_at() == NOW + LEARN_SECONDS + OVERLAP_SECONDS
    with pytest.raises(ConfigurationError, match="taking over already"):
        add_authority(tmp_path / "ca", name="three", now=NOW)
    assert retire_authorities(tmp_path / "ca") == ["ca"]
    after = folder()
    assert [each.fingerprint for each in after.trusted] == [new.fingerprint]
    assert after.fingerprints == {old.fingerprint, new.fingerprint}


def test_takeover_that_stopped_between_two_files_leaves_the_older_one_in_effect(tmp_path: Path) -> None:
    old = CertificateAuthority.create(tmp_path / "ca", name="one", now=NOW)
    add_authority(tmp_path / "ca", name="two", now=NOW)
    (tmp_path / "ca" / "ca-2.key").unlink()  # the certificate is written first
    assert load_authorities(tmp_path / "ca", NOW).issuing.fingerprint == old.fingerprint
    third = add_authority(tmp_path / "ca", name="two", now=NOW)
    assert (tmp_path / "ca" / "ca-3.key").exists()
    assert load_authorities(tmp_path / "ca", NOW).trusted[0].fingerprint == third.fingerprint


def test_authority_that_nobody_needs_any_more_is_said_once_a_day(
    deployment: Books, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = deployment.clock
    folder = AuthorityFolder(tmp_path / "own", clock)
    CertificateAuthority.create(folder.folder, name="one", now=NOW)
    watch = AuthorityWatch(folder, deployment.repository, clock)
    said = []
    for day in range(12):
        if day == 1:
            add_authority(folder.folder, name="two", now=clock.seconds)
        watch.tick()
        watch.tick()
        said.append(caplog.text.count("old_authority_still_counts"))
        clock.seconds += DAY
    assert said == [0] * 9 + [1, 2, 3]
    listed = deployment.repository.read("/targets/" + listed_authorities(deployment))
    assert listed == folder().bundle_pem.encode()


def listed_authorities(deployment: Books) -> str:
    (name,) = [
        key.removeprefix("tuf/targets/")
        for key in deployment.artefacts.keys("tuf/targets/keys")
        if key.endswith("authorities.pem") and deployment.artefacts.read(key).count(b"BEGIN") == 2
    ]
    return name


# ---- the commands, the ports and a device ----


class Machine:
    """The machine's clock, so many seconds back."""

    def __init__(self) -> None:
        self.behind = 0.0

    def now(self) -> float:
        return time.time() - self.behind

    def monotonic(self) -> float:
        return time.monotonic()


class Cloud:
    """Both ports of a deployment, and its commands."""

    def __init__(self, deployment: Deployment, front: HttpsFront, capsys: pytest.CaptureFixture[str]) -> None:
        self.deployment = deployment
        self.front = front
        self._capsys = capsys

    def __call__(self, *words: str) -> Any:
        """Runs `shoal-cloud keys …` as another process would; what the service sees a second later, it sees now."""
        self._capsys.readouterr()
        code = main(["keys", *words, "--state", str(self.deployment.folder.root), "--json"])
        captured = self._capsys.readouterr()
        self.front.follow()
        return captured.err if code else json.loads(captured.out)

    def enrol(self, name: str, folder: Path) -> Identity:
        with self.deployment.database.transaction() as connection:
            token = mint_token(
                connection, self.deployment.door(self.front.public_port), now=time.time(), device=name
            )
        return enrol(str(token), folder / name, clock=SystemClock())


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def cloud(tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> Iterator[Cloud]:
    settings = CloudSettings(
        tenant="t",
        fleet="f",
        listen=ListenSettings(public_port=0, device_port=0, tls_name="cloud.test"),
        enrolment=EnrolmentSettings(address_per_minute=10_000, per_minute=10_000),
    )
    machine.behind = 30 * DAY
    with initialise(tmp_path / "cloud", settings, clock=machine) as deployment:
        machine.behind = 0.0
        deployment.repository.refresh()
        with HttpsFront(deployment, broker_url="mqtt://127.0.0.1:1883") as front:
            yield Cloud(deployment, front, capsys)


def check(identity: Identity) -> Identity:
    """A release check of a device, whatever it must do to be let in; the device after it."""
    assert identity.folder is not None
    _check_with_trust(identity.folder.parent, time.time(), REQUEST, identity)
    return identity_files.load(identity.folder.parent)


def issuer(identity: Identity) -> str:
    return x509.load_pem_x509_certificate(identity.certificate_pem).issuer.rfc4514_string()


def trusted(cloud: Cloud) -> frozenset[bytes]:
    return certificate_fingerprints(cloud.deployment.authorities.bundle_pem.encode())


def test_device_hears_of_the_next_authority_and_renews_under_it(
    cloud: Cloud, machine: Machine, tmp_path: Path
) -> None:
    device = cloud.enrol("dev", tmp_path)
    old = cloud.deployment.authority.fingerprint
    assert certificate_fingerprints(device.ca_pem) == trusted(cloud)
    made = add_authority(
        cloud.deployment.folder.authority, name=cloud.deployment.authority_name, now=time.time() - 2 * DAY
    )
    cloud.deployment.repository.set_authorities(cloud.deployment.authorities.bundle_pem.encode())
    cloud.front.follow()
    told = check(device)
    assert certificate_fingerprints(told.ca_pem) == {bytes.fromhex(old), bytes.fromhex(made.fingerprint)}
    renewed = renew(told)
    assert issuer(renewed) != issuer(device)
    states = {row["key_id"]: row["state"] for row in cloud("show") if row["role"] == "ca"}
    assert states == {made.fingerprint: "counts", old: "still counts"}
    assert "wait 6.0 days more" in cloud("retire", "ca")
    assert cloud("retire", "ca", "--now")["left_behind"] == 0
    assert certificate_fingerprints(check(identity_files.load(tmp_path / "dev")).ca_pem) == trusted(cloud)


def test_device_that_was_away_all_the_time_finds_the_way_back(cloud: Cloud, tmp_path: Path) -> None:
    """It knows no authority that counts, and has no certificate that does."""
    device = cloud.enrol("dev", tmp_path)
    cloud("rotate", "ca")
    assert cloud("retire", "ca", "--now")["left_behind"] == 1
    with pytest.raises(TrustError):
        renew(device)
    back = check(device)
    assert certificate_fingerprints(back.ca_pem) == trusted(cloud)
    assert issuer(back) != issuer(device)
    renew(back)


def test_stolen_authority_counts_no_more_at_once(cloud: Cloud, tmp_path: Path) -> None:
    """`shoal-cloud keys rotate ca --stolen`: what the thief makes opens nothing, and devices come back."""
    device = cloud.enrol("dev", tmp_path)
    thief = cloud.deployment.authority
    assert cloud("rotate", "ca", "--stolen")["may_retire_at"] == 0
    key = generate_tls_key()
    forged = thief.issue_device(make_csr(key, "dev").decode(), "dev", now=time.time())
    write_private(tmp_path / "forged.key", key)
    (tmp_path / "forged.pem").write_text(forged.pem)
    context = verified_context(
        cloud.deployment.authority.certificate_pem.encode(),
        certificate=tmp_path / "forged.pem",
        key=tmp_path / "forged.key",
    )
    with pytest.raises(TransportError):
        next(
            HttpsFetcher(device, context=context, attempts=1).fetch(
                "/metadata/timestamp.json", limit_bytes=9999
            )
        )
    back = check(device)
    assert thief.fingerprint not in {each.hex() for each in certificate_fingerprints(back.ca_pem)}
    renew(back)
    assert (cloud.deployment.folder.authority / "retired" / "ca.key").exists()
    assert [row["key_id"] for row in cloud("show") if row["role"] == "ca"] == [
        cloud.deployment.authority.fingerprint
    ]


def test_revoked_device_does_not_come_back_by_a_new_authority(cloud: Cloud, tmp_path: Path) -> None:
    device = cloud.enrol("dev", tmp_path)
    cloud.deployment.registry.revoke("dev", "stolen")
    cloud("rotate", "ca", "--stolen")
    with pytest.raises(EnrolmentError) as caught:
        check(device)
    assert caught.value.facts["code"] == "revoked"


def test_thief_of_the_authority_cannot_name_another_one(cloud: Cloud, tmp_path: Path) -> None:
    """He can stand for every server; what he says of authorities is not signed by the key that lists them."""
    device = cloud.enrol("dev", tmp_path)
    cloud("rotate", "ca", "--stolen")
    own = CertificateAuthority.create(
        tmp_path / "own", name="thief", now=time.time()
    ).certificate_pem.encode()
    repository = cloud.deployment.repository

    def in_between(path: str) -> bytes | None:
        return own if path.endswith("authorities.pem") else repository.read(path)

    def asked(source: Callable[[str], bytes | None]) -> bytes | None:
        return find_authorities(
            tmp_path / "tuf", device.tuf_root, MemoryFetcher(source), SystemClock(), device.ca_pem
        )

    with pytest.raises(ReleaseError):
        asked(in_between)
    yesterday = cloud.deployment.artefacts.read("tuf/metadata/timestamp.json")
    found = asked(repository.read)
    assert found is not None
    assert certificate_fingerprints(found) == trusted(cloud)
    repository.set_online_keys(b"{}")
    asked(repository.read)
    with pytest.raises(ReleaseError):  # what was true before is not taken any more
        asked(lambda path: yesterday if "timestamp" in path else repository.read(path))


def test_server_shows_the_new_authority_to_every_client_from_then_on(cloud: Cloud, tmp_path: Path) -> None:
    """Also to one that names no host, and to one that comes again with what it kept of its last connection."""
    before = cloud.deployment.authority.certificate_pem
    cloud("rotate", "ca", "--stolen")
    for pem, is_good in ((before, False), (cloud.deployment.authority.certificate_pem, True)):
        context = ssl.create_default_context(cadata=pem)
        context.check_hostname = False
        shown = []
        for name in ("cloud.test", None):
            try:
                with (
                    _connected(cloud.front.public_port) as plain,
                    context.wrap_socket(plain, server_hostname=name) as secured,
                ):
                    shown.append(secured.version())
            except ssl.SSLCertVerificationError:
                shown.append(None)
        assert shown == (["TLSv1.3"] * 2 if is_good else [None] * 2)


def _connected(port: int) -> Any:
    import socket

    return socket.create_connection(("127.0.0.1", port), 10)


def test_enrolment_during_the_overlap_trusts_both(cloud: Cloud, tmp_path: Path) -> None:
    cloud("rotate", "ca")
    device = cloud.enrol("dev", tmp_path)
    assert certificate_fingerprints(device.ca_pem) == trusted(cloud)
    assert len(trusted(cloud)) == 2
    assert check(device).ca_pem == device.ca_pem
    broken = replace(device, ca_pem=b"none")
    with pytest.raises(TrustError):
        identity_files.with_authorities(broken, b"none")


# ---- a real broker ----


@pytest.mark.mosquitto
@needs_mosquitto[1]
def test_broker_follows_both_authorities_and_then_the_new_one_alone(tmp_path: Path) -> None:
    """The mosquitto that the service starts, without a word to it: clients of the old one stay until it is retired."""
    settings = CloudSettings(tenant="t", fleet="f", broker=BrokerSettings(kind="mosquitto", port=0, tls=True))
    with (
        initialise(tmp_path / "state", settings) as deployment,
        open_broker(deployment) as (_, port),
        ExitStack() as stack,
    ):

        def member(name: str) -> Member:
            """A client with a certificate of the authority that signs now, which trusts every one that counts."""
            authorities, key = deployment.authorities, generate_tls_key()
            issued = authorities.issuing.issue_device(make_csr(key, name).decode(), name, now=time.time())
            (tmp_path / f"{name}.pem").write_text(issued.pem)
            write_private(tmp_path / f"{name}.key", key)
            tls = ssl.create_default_context(cadata=authorities.bundle_pem)
            tls.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
            made = Member(name, port, tls)
            stack.callback(made.transport.stop)
            made.join("fl/1/t/f/rd/+")
            return made

        old = member("old")
        folder = deployment.folder.authority
        add_authority(folder, name=deployment.authority_name, now=time.time() - 2 * DAY)
        old.mailbox.next(Disconnected)
        old.mailbox.next(Connected)
        new = member("new")
        assert retire_authorities(folder) == ["ca"]
        new.mailbox.next(Disconnected)
        new.mailbox.next(Connected)
        reasons = []  # the first ones may be of the broker's restart: closed, then nobody there
        while not any("certificate" in reason for reason in reasons):
            reasons.append(old.mailbox.next(Disconnected).reason)
            assert len(reasons) < 20, reasons
