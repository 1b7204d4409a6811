"""Certificates that end: a running agent gets its next one by itself, and the broker sees it, not the old one."""

from __future__ import annotations

import time
from pathlib import Path

from cloud_server.db.devices import insert_certificate
from cloud_server.db.devices import load_device as registered
from cloud_server.deployment import Deployment
from cloud_server.enrolment.ca import CertificateAuthority, ensure_server_files
from cloud_server.settings import BrokerSettings, CloudSettings, ListenSettings, RunSettings
from edge_agent.device import CertificateInUse, broker_context
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.enrol import enrol
from edge_agent.enrolment.identity import Identity
from edge_agent.settings import EdgeSettings, InferenceSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from process.clock import SystemClock
from process.options import render_toml
from tests.fleet import thirds
from tests.fleet.waiting import wait_for
from tests.transport.conftest import FAST, needs_mosquitto
from tests.transport.mailbox import Mailbox
from wire.primitives import SigningKey, certificate_not_after, generate_tls_key, make_csr, write_private
from wire.transport import Connected, Disconnected
from wire.transport.broker import BrokerTls, RunningBroker, start_broker
from wire.transport.mqtt import MqttTransport

pytestmark = needs_mosquitto
DAY = 86_400.0
LIFE_DAYS = 7.0
DEVICE = "gate-1"


def settings() -> CloudSettings:
    return CloudSettings(
        fleet="renewal",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="mosquitto", port=free_port(), tls=True),
        run=RunSettings(name="renewal", seed=1, quorum=1, paused=True),
    )


def age(deployment: Deployment, state: Path, *, days: float) -> bytes:
    """Replaces the device's certificate by one that it got so many days ago; returns it."""
    now = time.time() - days * DAY
    identity = identity_files.load(state)
    csr = make_csr(identity.tls_key_path.read_bytes(), DEVICE).decode()
    issued = deployment.authority.issue_device(csr, DEVICE, now=now, days=LIFE_DAYS)
    with deployment.database.transaction() as connection:
        insert_certificate(connection, DEVICE, issued.serial, issued=now, not_after=issued.not_after)
    identity.certificate_path.write_text(issued.pem)
    return issued.pem.encode()


def test_agent_at_two_thirds_of_its_certificates_life_renews_and_rejoins_while_it_answers(
    tmp_path: Path, thirds_bundle: Bundle
) -> None:
    federation = thirds.make_federation(DEVICE)
    place = tmp_path / "agent.toml"
    place.write_text(render_toml(EdgeSettings(inference=InferenceSettings(variant="int8"))))
    state = tmp_path / DEVICE
    with LocalCloud(tmp_path / "cloud", settings(), federation) as cloud:
        cloud.import_model(thirds_bundle)
        cloud.start()
        enrol(cloud.token(DEVICE), state, clock=SystemClock())
        old = age(cloud.deployment, state, days=LIFE_DAYS * 2 / 3)
        agent = LocalAgent(DEVICE, state, place, "", federation.devices[DEVICE], rate_hz=50.0)
        try:
            log = agent.log_file
            wait_for(lambda: "certificate_renewed" in log.read_text(), "the renewal")
            wait_for(lambda: "a new certificate" in log.read_text(), "the goodbye with the old certificate")
            wait_for(lambda: agent.status().get("connected") is True, "the broker, with the new one")
            asked = agent.sent
            wait_for(lambda: agent.answered + agent.errors > asked, "answers after the renewal")
            agent.check()
            agent.stop_feeding()
            wait_for(lambda: agent.answered + agent.errors == agent.sent, "an answer to every window")
        finally:
            agent.stop()
        assert agent.errors == 0
        new = identity_files.load(state).certificate_pem
        assert new != old
        assert certificate_not_after(new) > time.time() + (LIFE_DAYS - 1) * DAY
        with cloud.deployment.database.read() as connection:
            row = registered(connection, DEVICE)
        assert row is not None
        assert row.status == "approved"


def test_agent_that_was_away_longer_than_its_certificate_comes_back_by_itself(
    tmp_path: Path, thirds_bundle: Bundle
) -> None:
    """Real processes: the certificate expired 23 days ago, both ports with mutual TLS refuse it, the agent starts."""
    federation = thirds.make_federation(DEVICE)
    place = tmp_path / "agent.toml"
    place.write_text(render_toml(EdgeSettings(inference=InferenceSettings(variant="int8"))))
    state = tmp_path / DEVICE
    with LocalCloud(tmp_path / "cloud", settings(), federation) as cloud:
        cloud.import_model(thirds_bundle)
        cloud.start()
        enrol(cloud.token(DEVICE), state, clock=SystemClock())
        old = age(cloud.deployment, state, days=30)
        agent = LocalAgent(DEVICE, state, place, "", federation.devices[DEVICE], rate_hz=50.0)
        try:
            wait_for(lambda: "certificate_renewed" in agent.log_file.read_text(), "the late renewal")
            wait_for(lambda: agent.status().get("connected") is True, "the broker, with the new certificate")
            wait_for(lambda: agent.answered > 0, "answers of the model that it fetched with it")
            agent.check()
        finally:
            agent.stop()
        new = identity_files.load(state).certificate_pem
        assert new != old
        assert certificate_not_after(new) > time.time() + (LIFE_DAYS - 1) * DAY
        assert "certificate_renewed_late" in cloud.log_file.read_text()


class Gate:
    """A device on disk as far as TLS sees it, and a broker that asks for its certificate."""

    def __init__(self, folder: Path) -> None:
        now = time.time()
        self.authority = CertificateAuthority.create(folder / "ca", name="renewal", now=now - 30 * DAY)
        certificate, key = ensure_server_files(
            self.authority, folder / "ca", "broker", ["localhost", "127.0.0.1"], now=now
        )
        ca_file = folder / "ca" / "ca.pem"
        self.tls = BrokerTls(ca_file, certificate, key, tenant="t", fleet="f")
        self._key = generate_tls_key()
        place = folder / "identity"
        place.mkdir()
        write_private(place / identity_files.TLS_KEY, self._key)
        (place / identity_files.CA).write_text(self.authority.certificate_pem)
        self.certificate_path = place / identity_files.CERTIFICATE
        self.folder = place

    def issue(self, *, days_ago: float) -> bytes:
        """Writes a certificate that was given out so many days ago; returns it."""
        csr = make_csr(self._key, DEVICE).decode()
        issued = self.authority.issue_device(csr, DEVICE, now=time.time() - days_ago * DAY, days=LIFE_DAYS)
        self.certificate_path.write_text(issued.pem)
        return issued.pem.encode()

    def identity(self, broker: RunningBroker) -> Identity:
        return Identity(
            tenant="t",
            fleet="f",
            device=DEVICE,
            url_enrol="",
            url_api="",
            tls_name="localhost",
            mqtt_host=broker.host,
            mqtt_port=broker.port,
            mqtt_tls=True,
            ca_pem=self.authority.certificate_pem.encode(),
            certificate_pem=self.certificate_path.read_bytes(),
            update_key=SigningKey.generate(),
            tuf_root=b"",
            folder=self.folder,
        )


def test_expired_certificate_is_refused_by_the_broker_until_the_next_is_there(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    gate.issue(days_ago=LIFE_DAYS + 1)
    with start_broker("mosquitto", folder=tmp_path / "broker", tls=gate.tls) as broker:
        identity = gate.identity(broker)
        tls = broker_context(identity)
        transport = MqttTransport(DEVICE, broker.host, broker.port, tls=tls, backoff=FAST)
        certificate = CertificateInUse(identity, tls, transport)
        mailbox = Mailbox()
        transport.start(mailbox, filters=[("fl/1/t/f/cm/" + DEVICE, 1)])
        try:
            certificate.follow()
            reasons = {event.reason for event in mailbox.take(Disconnected, 3)}
            assert "the other side refused us in TLS: certificate expired" in reasons
            assert not [event for event in mailbox.seen if isinstance(event, Connected)]
            gate.issue(days_ago=0)
            certificate.follow()
            mailbox.next(Connected)
            gate.issue(days_ago=0)
            certificate.follow()
            assert mailbox.next(Disconnected).reason == "a new certificate"
            mailbox.next(Connected)
        finally:
            transport.stop()
