"""A revoked device at the broker: out at once, out for good, and nobody else with it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from cloud_server.enrolment.ca import refresh_revocation_list
from tests.transport.conftest import needs_mosquitto
from tests.transport.operated import DAY, FLEET, OBSERVER, TENANT, Cloud, Stage, operated
from tests.transport.raw_client import Gone, RawClient
from wire.primitives import generate_tls_key, make_csr
from wire.transport.broker import end_session

pytestmark = needs_mosquitto
BASE = f"fl/1/{TENANT}/{FLEET}"
HOUR = 3600.0


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Cloud:
    return Cloud(tmp_path_factory.mktemp("revocation"))


@pytest.fixture
def stage(cloud: Cloud, tmp_path: Path) -> Iterator[Stage]:
    with operated(cloud, tmp_path / "mosquitto") as running:
        yield running


def device(stage: Stage, name: str) -> tuple[ssl.SSLContext, str]:
    """Its TLS, and the serial of its certificate."""
    key = generate_tls_key()
    issued = stage.cloud.authority.issue_device(make_csr(key, name).decode(), name, now=time.time())
    return stage.cloud.loaded(key, issued.pem.encode()), issued.serial


def revoke(stage: Stage, *serials: str) -> None:
    """What the running service does first. Who is answered after the signal is answered after the list was read."""
    assert refresh_revocation_list(
        [stage.cloud.authority], stage.folder / "revoked.crl", serials, now=time.time()
    )
    stage.broker.reload()
    stage.join("anybody").close()


def cut_off(stage: Stage, name: str) -> None:
    """Under a certificate of a minute that the authority signs for this."""
    tls = stage.cloud.context_of(stage.cloud.authority, name, days=1 / 1440)
    end_session("127.0.0.1", stage.port, name, tls=tls)


def test_session_of_a_revoked_device_ends_and_never_comes_back(stage: Stage) -> None:
    tls, serial = device(stage, "dev1")
    other_tls, _ = device(stage, "dev2")
    with (
        RawClient(stage.port, tls, "dev1", clean=False, expiry_seconds=600) as revoked,
        RawClient(stage.port, other_tls, "dev2") as other,
    ):
        revoked.subscribe(f"{BASE}/cm/dev1", f"{BASE}/rd/+")
        other.subscribe(f"{BASE}/cm/dev2", f"{BASE}/rd/+")
        revoke(stage, serial)
        cut_off(stage, "dev1")
        revoked.until_gone()
        with pytest.raises(Gone):
            RawClient(stage.port, tls, "dev1", clean=False, expiry_seconds=600)
        with stage.join(OBSERVER) as observer:
            observer.publish(f"{BASE}/cm/dev1", b"for nobody")
            observer.publish(f"{BASE}/rd/5", b"for all")
            assert other.until(b"for all") == []
    # Its session is forgotten: a certificate that was not revoked finds no queue of it.
    with RawClient(
        stage.port, stage.cloud.context_of(stage.cloud.authority, "dev1"), "dev1", clean=False
    ) as again:
        assert not again.session_present
        again.publish(f"{BASE}/tm/dev1", b"x")
        assert again.received == []


def test_without_ending_its_session_a_revoked_device_goes_on_listening(stage: Stage) -> None:
    """Why `end_session` exists: a list alone ends nothing."""
    tls, serial = device(stage, "dev1")
    with RawClient(stage.port, tls, "dev1") as revoked:
        revoked.subscribe(f"{BASE}/rd/+")
        revoke(stage, serial)
        with pytest.raises(Gone):
            RawClient(stage.port, tls, "other")
        with stage.join(OBSERVER) as observer:
            observer.publish(f"{BASE}/rd/5", b"for all")
        assert revoked.until(b"for all") == []


def test_reading_the_list_again_disturbs_nobody(stage: Stage) -> None:
    serials = []
    tls, _ = device(stage, "dev1")
    with RawClient(stage.port, tls, "dev1") as staying:
        staying.subscribe(f"{BASE}/rd/+")
        for number in range(20):  # several in one second: each list counts
            gone_tls, serial = device(stage, f"gone-{number}")
            RawClient(stage.port, gone_tls, "gone").close()
            serials.append(serial)
            revoke(stage, *serials)
            with pytest.raises(Gone):
                RawClient(stage.port, gone_tls, "gone")
        with stage.join(OBSERVER) as observer, stage.join("dev2") as newcomer:
            newcomer.subscribe(f"{BASE}/rd/+")
            observer.publish(f"{BASE}/rd/5", b"for all")
            assert staying.until(b"for all") == []
            assert newcomer.until(b"for all") == []


def test_revoked_device_cannot_resume_its_tls_session(stage: Stage) -> None:
    """A ticket must not stand in for a certificate that is no longer good."""
    tls, serial = device(stage, "dev1")
    with RawClient(stage.port, tls, "dev1") as first:
        first.publish(f"{BASE}/tm/dev1", b"x")
        assert isinstance(first.socket, ssl.SSLSocket)
        ticket = first.socket.session
    revoke(stage, serial)
    with pytest.raises(Gone):
        RawClient(stage.port, tls, "dev1", session=ticket)


def test_list_reaches_as_far_as_the_authority_and_begins_in_the_past(stage: Stage) -> None:
    """Past `nextUpdate`, and before `lastUpdate`, mosquitto lets nobody in."""
    revoked = x509.load_pem_x509_crl((stage.folder / "revoked.crl").read_bytes())
    authority = x509.load_pem_x509_certificate(stage.cloud.ca_file.read_bytes())
    assert revoked.next_update_utc == authority.not_valid_after_utc
    assert revoked.last_update_utc.timestamp() <= time.time() - HOUR + 60


@pytest.mark.parametrize("begin", [-400 * DAY, 2 * DAY], ids=["ended", "from the future"])
def test_list_that_does_not_hold_now_lets_nobody_in(begin: float, stage: Stage) -> None:
    """The trap that the two dates avoid, shown at the broker itself."""
    place = stage.folder / "revoked.crl"
    stage.broker.stop()
    place.write_bytes(short_list(stage, time.time() + begin))
    assert stage.broker.revive()
    with pytest.raises(Gone):
        stage.join("dev1")
    stage.broker.stop()
    refresh_revocation_list([stage.cloud.authority], place, [], now=time.time())
    assert stage.broker.revive()
    stage.join("dev1").close()


def short_list(stage: Stage, begin: float) -> bytes:
    """A list of one day that the authority signs."""
    import datetime

    from cryptography.hazmat.primitives import serialization

    when = datetime.datetime.fromtimestamp(begin, tz=datetime.UTC).replace(microsecond=0)
    key = serialization.load_pem_private_key(
        (stage.cloud.state / "ca" / "ca.key").read_bytes(), password=None
    )
    issuer = x509.load_pem_x509_certificate(stage.cloud.ca_file.read_bytes()).subject
    built = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer)
        .last_update(when)
        .next_update(when + datetime.timedelta(days=1))
        .sign(key, None)  # type: ignore[arg-type]
    )
    return built.public_bytes(serialization.Encoding.PEM)


def test_list_is_written_anew_when_it_changes_or_is_a_day_old(stage: Stage, tmp_path: Path) -> None:
    place, authority, now = tmp_path / "list", stage.cloud.authority, time.time()

    def refreshed(serials: list[str], at: float) -> bool:
        return refresh_revocation_list([authority], place, serials, now=at)

    assert refreshed([], now)
    assert not refreshed([], now + 10)
    assert refreshed(["ab"], now + 10)
    assert refreshed(["ab", "cd"], now + 10)
    first = x509.load_pem_x509_crl(place.read_bytes()).last_update_utc
    assert not refreshed(["cd", "ab"], now + 10)
    assert refreshed(["ab", "cd"], now + 20 + DAY)
    assert x509.load_pem_x509_crl(place.read_bytes()).last_update_utc > first
    place.write_bytes(b"damaged")
    assert refreshed(["ab"], now)
