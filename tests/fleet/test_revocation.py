"""A stolen device, with real processes: one command, and it is out at the broker and over HTTPS."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cloud_server.settings import BrokerSettings, CloudSettings, ListenSettings, RunSettings
from edge_agent.device import broker_context
from edge_agent.enrolment.enrol import enrol, renew, renew_late
from edge_agent.enrolment.identity import Identity
from fleet.local_cloud import LocalCloud, free_port
from process.clock import SystemClock
from tests.fleet import thirds
from tests.fleet.waiting import wait_for
from tests.transport.conftest import FAST, needs_mosquitto
from tests.transport.mailbox import Mailbox
from wire.errors import EnrolmentError
from wire.transport import Connected, Disconnected, Packet
from wire.transport.mqtt import MqttTransport

pytestmark = needs_mosquitto
BASE = "fl/1/shoal/revoked"


def settings() -> CloudSettings:
    return CloudSettings(
        fleet="revoked",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="mosquitto", port=free_port(), tls=True),
        run=RunSettings(paused=True),
    )


def joined(identity: Identity) -> tuple[MqttTransport, Mailbox]:
    tls = broker_context(identity)
    transport = MqttTransport(identity.device, identity.mqtt_host, identity.mqtt_port, tls=tls, backoff=FAST)
    mailbox = Mailbox()
    transport.start(mailbox, filters=[(f"{BASE}/cm/{identity.device}", 1)])
    mailbox.next(Connected)
    return transport, mailbox


def test_revoked_device_is_out_by_one_command(tmp_path: Path) -> None:
    with LocalCloud(tmp_path / "cloud", settings(), thirds.make_federation("stolen")) as cloud:
        cloud.start()
        stolen, honest = (
            enrol(cloud.token(name), tmp_path / name, clock=SystemClock()) for name in ("stolen", "honest")
        )
        transport, mailbox = joined(stolen)
        other, others = joined(honest)
        try:
            command = ["device", "revoke", "stolen", "--reason", "stolen", "--state", str(cloud.root)]
            code = f"import sys; from cloud_server.cli import main; sys.exit(main({command!r}))"
            subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
            for call in (renew, renew_late):  # over HTTPS at once
                with pytest.raises(EnrolmentError) as caught:
                    call(stolen)
                assert caught.value.facts["code"] == "revoked"
            reasons = [event.reason for event in mailbox.take(Disconnected, 3)]
            assert any("certificate revoked" in reason for reason in reasons[1:]), reasons
            wait_for(lambda: "session_ended" in cloud.log_file.read_text(), "the end of the session")
            other.publish(Packet(f"{BASE}/st/honest", b"still here"))
            assert not [event for event in others.drain() if isinstance(event, Disconnected)]
            assert not [event for event in mailbox.drain() if isinstance(event, Connected)]
        finally:
            transport.stop()
            other.stop()
