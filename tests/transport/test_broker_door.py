"""Who gets through the broker's door at all, and how much it keeps for whom."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud_server.cli import main
from cloud_server.enrolment.ca import CertificateAuthority
from tests.transport.conftest import needs_mosquitto
from tests.transport.operated import DAY, Cloud, Stage, operated
from tests.transport.raw_client import Gone, RawClient
from wire.transport.broker import RunningBroker, start_broker
from wire.transport.broker_configuration import BrokerLimits

pytestmark = needs_mosquitto
NAME = "dev1"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Cloud:
    return Cloud(tmp_path_factory.mktemp("door"))


@pytest.fixture(scope="module")
def stage(cloud: Cloud) -> Iterator[Stage]:
    with operated(cloud, cloud.folder / "mosquitto") as running:
        yield running


def good(cloud: Cloud) -> ssl.SSLContext:
    return cloud.context_of(cloud.authority, NAME)


def expired(cloud: Cloud) -> ssl.SSLContext:
    return cloud.context_of(cloud.authority, NAME, begin=time.time() - 8 * DAY)


def not_yet_valid(cloud: Cloud) -> ssl.SSLContext:
    return cloud.context_of(cloud.authority, NAME, begin=time.time() + 2 * DAY)


def of_another_authority(cloud: Cloud) -> ssl.SSLContext:
    """Which calls itself as ours does."""
    folder = cloud.folder / "stranger"
    if not folder.exists():
        CertificateAuthority.create(folder, name="Shoal CA of acme north", now=time.time())
    return cloud.context_of(CertificateAuthority.load(folder), NAME)


def signed_by_a_device(cloud: Cloud) -> ssl.SSLContext:
    """A device's certificate is no authority."""
    from wire.primitives import generate_tls_key, make_csr

    key, name = generate_tls_key(), "dev9"
    own = cloud.authority.issue_device(make_csr(key, name).decode(), name, now=time.time())
    return cloud.context_of(CertificateAuthority(key, own.pem.encode()), NAME)


def of_the_server(cloud: Cloud) -> ssl.SSLContext:
    """A server's certificate of our authority is no client's."""
    folder = cloud.folder / "mosquitto"
    return cloud.loaded((folder / "broker.key").read_bytes(), (folder / "broker.pem").read_bytes())


def without_certificate(cloud: Cloud) -> ssl.SSLContext:
    return cloud.stranger()


def with_tls_1_2(cloud: Cloud) -> ssl.SSLContext:
    context = good(cloud)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def without_tls(cloud: Cloud) -> None:
    return None


STRANGERS: list[Callable[[Cloud], ssl.SSLContext | None]] = [
    expired,
    not_yet_valid,
    of_another_authority,
    signed_by_a_device,
    of_the_server,
    without_certificate,
    with_tls_1_2,
    without_tls,
]


@pytest.mark.parametrize("comes", STRANGERS)
def test_stranger_does_not_get_in(comes: Callable[[Cloud], ssl.SSLContext | None], stage: Stage) -> None:
    with pytest.raises(Gone):
        RawClient(stage.port, comes(stage.cloud), NAME)
    with RawClient(stage.port, good(stage.cloud), NAME) as device:
        assert isinstance(device.socket, ssl.SSLSocket)
        assert device.socket.version() == "TLSv1.3"


def test_certificate_of_a_device_cannot_stand_for_the_broker(stage: Stage, tmp_path: Path) -> None:
    """What a device would believe if another device sat on the broker's address."""
    pair = tmp_path / "pair.pem"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    from wire.primitives import generate_tls_key, make_csr

    key = generate_tls_key()
    issued = stage.cloud.authority.issue_device(
        make_csr(key, "localhost").decode(), "localhost", now=time.time()
    )
    pair.write_bytes(key + issued.pem.encode())
    server.load_cert_chain(pair)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = stage.cloud.stranger()
    client.check_hostname = False  # what is left is the purpose that the certificate is for
    end = client.wrap_bio(outgoing, incoming)
    other = server.wrap_bio(incoming, outgoing, server_side=True)
    with pytest.raises(ssl.SSLWantReadError):
        end.do_handshake()
    with pytest.raises(ssl.SSLWantReadError):
        other.do_handshake()
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        end.do_handshake()


# ---- limits ------------------------------------------------------------------------------------------------


def waiting_for(broker: RunningBroker, cloud: RawClient, name: str) -> list[bytes]:
    """What an absent client finds when it is back. A full queue takes nothing, so the last word is said again until it
    comes through; each round trip makes room."""
    with RawClient(broker.port, None, name, clean=False, expiry_seconds=60) as back:
        assert back.session_present
        for _ in range(100):
            cloud.publish(f"to/{name}", b"last")
            back.subscribe(f"to/{name}")
            if b"last" in [message.payload for message in back.received]:
                break
        return [message.payload for message in back.until(b"last")]


def leave_behind(broker: RunningBroker, name: str) -> None:
    """A session that waits for its client."""
    absent = RawClient(broker.port, None, name, clean=False, expiry_seconds=60)
    absent.subscribe(f"to/{name}")
    absent.leave()


def test_queue_of_one_absent_client_is_bounded_and_takes_nothing_from_others(tmp_path: Path) -> None:
    limits = BrokerLimits(queued_messages=20, max_inflight=4)
    with start_broker("mosquitto", folder=tmp_path, limits=limits) as broker:
        leave_behind(broker, "full")
        leave_behind(broker, "other")
        with (
            RawClient(broker.port, None, "present") as present,
            RawClient(broker.port, None, "cloud") as cloud,
        ):
            present.subscribe("to/full")
            sent = [str(number).encode() for number in range(100)]
            for number, payload in enumerate(sent):
                cloud.publish("to/full", payload)
                assert present.until(payload) == []
                if number % 10 == 0:
                    cloud.publish("to/other", payload)
            kept = waiting_for(broker, cloud, "full")
            assert waiting_for(broker, cloud, "other") == sent[::10]
    assert kept == sent[: len(kept)]
    assert 20 <= len(kept) <= 24


def test_queue_of_one_absent_client_is_bounded_in_bytes(tmp_path: Path) -> None:
    limits = BrokerLimits(queued_bytes=50_000, max_inflight=1)
    with start_broker("mosquitto", folder=tmp_path, limits=limits) as broker:
        leave_behind(broker, "full")
        with RawClient(broker.port, None, "cloud") as cloud:
            for _ in range(50):
                cloud.publish("to/full", bytes(10_000))
            kept = waiting_for(broker, cloud, "full")
    assert 1 <= len(kept) <= 7


def test_flood_of_retained_messages_ends_at_the_memory_limit_and_the_broker_lives(tmp_path: Path) -> None:
    limits = BrokerLimits(memory_bytes=16 * 2**20)
    with start_broker("mosquitto", folder=tmp_path, limits=limits) as broker:
        with RawClient(broker.port, None, "flood") as flood:
            taken = flood_until_cut_off(flood)
        assert 0 < taken * 100_000 < limits.memory_bytes + 1_000_000
        assert is_carrying(broker)
        broker.stop()
        assert broker.revive()
        assert is_carrying(broker)


def flood_until_cut_off(flood: RawClient) -> int:
    """Leaves retained messages of 100 kB under ever new topics; returns how many were taken."""
    for number in range(400):
        try:
            flood.publish(f"to/{number}", bytes(100_000), retain=True)
        except Gone:
            return number
    raise AssertionError("40 MB were taken")


def is_carrying(broker: RunningBroker) -> bool:
    """Whether a small message of somebody else still gets through."""
    with RawClient(broker.port, None, "somebody") as client:
        client.subscribe("small")
        client.publish("small", b"message")
        return client.until(b"message") == []


# ---- the command -------------------------------------------------------------------------------------------


def test_files_are_private_and_the_command_does_not_overwrite_them(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stage.cloud.write(out, 8883)
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == {
        "mosquitto.conf": 0o600,
        "access": 0o600,
        "ca.pem": 0o600,
        "broker.pem": 0o600,
        "broker.key": 0o600,
        "revoked.crl": 0o600,
    }
    key = (out / "broker.key").read_bytes()
    words = ["broker", "config", "--state", str(stage.cloud.state), "--out", str(out)]
    capsys.readouterr()
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "broker.key").read_bytes() == key
    assert main([*words, "--force"]) == 0
    assert (out / "broker.key").read_bytes() != key
