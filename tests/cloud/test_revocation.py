"""A revoked device: its next message is refused, its session at the broker ends, its certificate opens no door."""

from __future__ import annotations

import ssl
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloud_server.broker import open_broker
from cloud_server.db.devices import insert_certificate
from cloud_server.deployment import Deployment, initialise
from cloud_server.enrolment.authorities import only
from cloud_server.enrolment.ca import ensure_client_files
from cloud_server.enrolment.sessions import RevokedSessions
from cloud_server.inbox import Inbox
from cloud_server.registry import AGGREGATOR_NAME, Registry, add_device
from cloud_server.settings import BrokerSettings, CloudSettings
from tests.cloud.deployment import Deployment as Books
from tests.cloud.deployment import Newcomer
from tests.cloud.test_inbox import KEM, SLOT, TOPICS, Heard, telemetry
from tests.transport.conftest import FAST, needs_mosquitto
from tests.transport.mailbox import Mailbox
from wire.envelope import seal
from wire.errors import BackpressureError, BrokerError
from wire.header import Header
from wire.messages import encode_body
from wire.primitives import SigningKey, generate_tls_key, make_csr
from wire.transport import Connected, Disconnected, Packet, Received, TransportEvent
from wire.transport.mqtt import MqttTransport

# ---- messages ----


@dataclass
class Speaker:
    """A device that is let in and goes on speaking in one session."""

    newcomer: Newcomer
    inbox: Inbox
    seq: int = 0

    def say(self, requests: int) -> None:
        self.seq += 1
        device = self.newcomer.device
        header = Header(
            type="tm", direction="up", tenant="t", fleet="f", device=device, epoch=1, seq=self.seq
        )
        body = encode_body(telemetry(requests))
        message = seal(header, body, signer=self.newcomer.update_key, recipient=KEM.public_key, pad=True)
        self.inbox.receive(Packet(TOPICS.by_device("tm", device), message))


def listening(books: Books, heard: Heard) -> Inbox:
    return Inbox(
        topics=TOPICS,
        signers=books.registry.signers,
        is_known=lambda device: books.registry.status(device) not in ("", "revoked"),
        kem_keys={KEM.key_id: KEM},
        receiver=heard,
        clock=books.clock,
        slot_bytes=SLOT,
    )


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def speakers(deployment: Books, heard: Heard) -> tuple[Speaker, Speaker]:
    inbox = listening(deployment, heard)
    found = tuple(Speaker(Newcomer(name), inbox) for name in ("dev", "other"))
    for each in found:
        deployment.enrolment.enrol(each.newcomer.request(deployment.mint()))
    return found  # type: ignore[return-value]


def test_next_message_of_a_revoked_device_is_refused_within_its_session(
    deployment: Books, heard: Heard, speakers: tuple[Speaker, Speaker]
) -> None:
    dev, other = speakers
    dev.say(1)
    other.say(2)
    deployment.registry.revoke("dev", "stolen")
    dev.say(3)
    other.say(4)
    assert heard.calls == [("telemetry", "dev", 1), ("telemetry", "other", 2), ("telemetry", "other", 4)]
    assert dev.inbox.refused_total == {"tm: signer": 1}


def test_revocation_by_another_process_counts_for_the_next_message(
    deployment: Books, heard: Heard, speakers: tuple[Speaker, Speaker]
) -> None:
    """What `shoal-cloud device revoke` writes is seen without a word between the processes."""
    dev, _ = speakers
    dev.say(1)
    Registry(deployment.database, deployment.clock).revoke("dev")
    dev.say(2)
    assert heard.calls == [("telemetry", "dev", 1)]


# ---- sessions ----


class Fake:
    """A broker's two levers, each taken down; it can be out of reach."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.is_away = False

    def reload(self) -> None:
        self.done.append("reload")

    def end(self, device: str) -> None:
        if self.is_away:
            raise BrokerError("nobody answers")
        self.done.append(f"end {device}")


@pytest.fixture
def levers() -> Fake:
    return Fake()


def following(books: Books, folder: Path, levers: Fake) -> RevokedSessions:
    return RevokedSessions(
        books.database,
        only(books.authority),
        books.clock,
        list_file=folder / "revoked.crl",
        reload=levers.reload,
        end_session=levers.end,
    )


def test_session_is_ended_once_after_the_list_is_read(
    deployment: Books, speakers: tuple[Speaker, Speaker], levers: Fake, tmp_path: Path
) -> None:
    sessions = following(deployment, tmp_path, levers)
    sessions.follow()
    assert levers.done == ["reload"]  # the first list, of nobody
    deployment.registry.revoke("dev")
    deployment.clock.seconds += 10
    for _ in range(3):
        sessions.follow()
    assert levers.done == ["reload", "reload", "end dev"]
    deployment.registry.rename("other", "a label")
    sessions.follow()
    assert levers.done == ["reload", "reload", "end dev"]


def test_session_that_could_not_be_ended_is_tried_again(
    deployment: Books, speakers: tuple[Speaker, Speaker], levers: Fake, tmp_path: Path
) -> None:
    sessions = following(deployment, tmp_path, levers)
    deployment.registry.revoke("dev")
    levers.is_away = True
    sessions.follow()
    levers.is_away = False
    sessions.follow()
    assert levers.done == ["reload", "end dev"]


def test_device_whose_certificates_ended_is_left_alone(
    deployment: Books, speakers: tuple[Speaker, Speaker], levers: Fake, tmp_path: Path
) -> None:
    deployment.registry.revoke("dev")
    deployment.clock.seconds += 8 * 86_400.0
    following(deployment, tmp_path, levers).follow()
    assert levers.done == ["reload"]


# ---- a real broker ----

BASE = "fl/1/t/f"


def context(deployment: Deployment, certificate: Path, key: Path) -> ssl.SSLContext:
    made = ssl.create_default_context(cadata=deployment.authority.certificate_pem)
    made.load_cert_chain(certificate, key)
    return made


class Member:
    """An enrolled device, or the aggregator, as far as the broker sees it."""

    def __init__(self, name: str, port: int, tls: ssl.SSLContext) -> None:
        self.tls = tls
        self.transport = MqttTransport(name, "127.0.0.1", port, tls=tls, backoff=FAST)
        self.mailbox = Mailbox()

    def join(self, *filters: str) -> None:
        self.transport.start(self.mailbox, filters=[(each, 1) for each in filters])
        self.mailbox.next(Connected)

    def has_heard(self, payload: bytes) -> bool:
        self.mailbox.drain()
        return any(
            isinstance(event, Received) and event.packet.payload == payload for event in self.mailbox.seen
        )

    def count(self, kind: type[TransportEvent]) -> int:
        self.mailbox.drain()
        return sum(isinstance(event, kind) for event in self.mailbox.seen)


def enrolled(deployment: Deployment, name: str, port: int, folder: Path) -> Member:
    key, now = generate_tls_key(), deployment.clock.now()
    issued = deployment.authority.issue_device(make_csr(key, name).decode(), name, now=now)
    with deployment.database.transaction() as connection:
        add_device(connection, name, SigningKey.generate().verify_key, now=now)
        insert_certificate(connection, name, issued.serial, issued=now, not_after=issued.not_after)
    certificate_path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_path.write_text(issued.pem)
    key_path.write_bytes(key)
    return Member(name, port, context(deployment, certificate_path, key_path))


def aggregator(deployment: Deployment, port: int, folder: Path) -> Member:
    files = ensure_client_files(deployment.authority, folder, AGGREGATOR_NAME, now=deployment.clock.now())
    return Member(AGGREGATOR_NAME, port, context(deployment, *files))


@pytest.mark.mosquitto
@needs_mosquitto[1]
def test_revoked_device_neither_hears_nor_speaks_at_the_broker_and_does_not_come_back(tmp_path: Path) -> None:
    """By delivery, on the broker that the service starts; a device of the same fleet does not even notice."""
    settings = CloudSettings(tenant="t", fleet="f", broker=BrokerSettings(kind="mosquitto", port=0, tls=True))
    with (
        initialise(tmp_path / "state", settings) as deployment,
        open_broker(deployment) as (_, port),
        ExitStack() as stack,
    ):
        thief, honest = (enrolled(deployment, name, port, tmp_path) for name in ("thief", "honest"))
        cloud = aggregator(deployment, port, tmp_path)
        for member in (thief, honest, cloud):
            stack.callback(member.transport.stop)
        thief.join(f"{BASE}/rd/+", f"{BASE}/cm/thief")
        honest.join(f"{BASE}/rd/+")
        cloud.join(f"{BASE}/st/+")
        cloud.transport.publish(Packet(f"{BASE}/rd/now", b"before"))
        thief.transport.publish(Packet(f"{BASE}/st/thief", b"here"))
        thief.mailbox.until_payload(b"before")
        honest.mailbox.until_payload(b"before")
        cloud.mailbox.until_payload(b"here")

        deployment.registry.revoke("thief", "stolen")
        thief.mailbox.next(Disconnected)
        assert "revoked" in thief.mailbox.take(Disconnected, 2)[-1].reason  # it tries again, and TLS says no
        with pytest.raises(BackpressureError):
            thief.transport.publish(Packet(f"{BASE}/st/thief", b"once more"))

        cloud.transport.publish(Packet(f"{BASE}/rd/now", b"after"))
        cloud.transport.publish(Packet(f"{BASE}/cm/thief", b"for you"))
        honest.transport.publish(Packet(f"{BASE}/st/honest", b"still here"))
        honest.mailbox.until_payload(b"after")
        cloud.mailbox.until_payload(b"still here")
        assert not thief.has_heard(b"after")
        assert not thief.has_heard(b"for you")
        assert not cloud.has_heard(b"once more")
        assert (thief.count(Connected), honest.count(Disconnected)) == (1, 0)
