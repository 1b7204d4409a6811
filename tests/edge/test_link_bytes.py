"""What the link really pays for, counted by the kernel on real connections: the arithmetic of `[link]` holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from paho.mqtt import client as paho

from edge_agent.enrolment.enrol import enrol
from edge_agent.link.allowance import NOTE_NAME
from edge_agent.link.budget import CHECK_BYTES, HEARTBEAT_BYTES, PING_BYTES, REPORT_BYTES, idle_bytes_a_day
from edge_agent.link.door import Link, plan_of
from edge_agent.release.child import ChildReleases
from edge_agent.settings import EdgeSettings, LinkSettings
from edge_agent.store.orders import ReplayWindows
from edge_agent.store.sequence import Sequence
from edge_agent.store.storage import MEMORY, Database, open_database
from edge_agent.uplink.speaker import Speaker
from models.bundle import Bundle
from process.clock import SystemClock
from tests.edge.aggregator import Aggregator
from tests.edge.lab import FLEET, TENANT, Lab
from tests.transport.certificates import Authority
from tests.transport.conftest import needs_mosquitto
from tests.transport.mailbox import DEADLINE_SECONDS, Mailbox
from wire.messages import InferenceReport, Telemetry
from wire.traffic import Traffic
from wire.transport import Connected, Published
from wire.transport.broker import BrokerTls, start_broker
from wire.transport.mqtt import MqttTransport

Joined = tuple[MqttTransport, Mailbox]


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Callable[[int], Joined]]:
    """Connects a device to mosquitto over mutual TLS."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("127.0.0.1")
    tls = BrokerTls(authority.ca_file, certificate, key, TENANT, FLEET)
    clients: list[MqttTransport] = []
    with start_broker("mosquitto", folder=tmp_path / "broker", tls=tls) as broker:

        def join(keepalive_seconds: int) -> Joined:
            client = MqttTransport(
                "dev-1",
                "127.0.0.1",
                broker.port,
                tls=authority.context("dev-1"),
                keepalive_seconds=keepalive_seconds,
            )
            events = Mailbox()
            client.start(events, filters=[(f"fl/1/{TENANT}/{FLEET}/ak/dev-1", 1)])
            clients.append(client)
            events.next(Connected)
            return client, events

        yield join
        for client in clients:
            client.stop()


def traffic(client: MqttTransport) -> Traffic:
    found = client.traffic()
    assert found is not None
    return found


@pytest.mark.mosquitto
@needs_mosquitto[1]
def test_ping_costs_no_more_than_the_arithmetic_says(
    joined: Callable[[int], Joined], monkeypatch: pytest.MonkeyPatch
) -> None:
    pings: list[int] = []
    enough = threading.Event()
    answered = paho.Client._handle_pingresp

    def noting(client: paho.Client) -> object:
        result = answered(client)
        pings.append(traffic(device[0]).total_bytes)
        if len(pings) == 4:
            enough.set()
        return result

    monkeypatch.setattr(paho.Client, "_handle_pingresp", noting)
    device = joined(1)
    assert enough.wait(DEADLINE_SECONDS)
    each = (pings[3] - pings[0]) / 3
    assert 150 < each <= PING_BYTES, "two records and an acknowledgement"


@pytest.mark.mosquitto
@needs_mosquitto[1]
def test_heartbeats_and_reports_cost_no_more_than_the_arithmetic_says(
    joined: Callable[[int], Joined], bundle: Bundle, tmp_path: Path
) -> None:
    client, events = joined(600)
    for body, most in ((_heartbeat(), HEARTBEAT_BYTES), (_report(), REPORT_BYTES)):
        packet = _speaker(Lab(bundle, tmp_path)).quick(body)
        before = traffic(client)
        for _ in range(10):
            received = traffic(client).received_bytes
            client.publish(packet)
            events.next(Published)
            _acknowledged(client, received)
        each = (traffic(client).total_bytes - before.total_bytes) / 10
        assert len(packet.payload) < each <= most


def _acknowledged(client: MqttTransport, received: int) -> None:
    """Waits for the segment that acknowledges, which an idle device pays for each time."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while traffic(client).received_bytes == received and time.monotonic() < deadline:
        threading.Event().wait(0.005)


def _heartbeat() -> Telemetry:
    """A talkative one: years of uptime, everything unwell."""
    return Telemetry(
        uptime_seconds=1e8,
        release_version=10**6,
        requests_total=10**12,
        errors_total=10**9,
        samples=10**7,
        labelled_samples=10**7,
        outbox=64,
        rss_bytes=10**9,
        sent_bytes_total=10**12,
        received_bytes_total=10**12,
        unwell=("disk", "clock", "broker"),
        remedies={"reconnect": 1000},
    )


def _report() -> InferenceReport:
    return InferenceReport(
        release_version=10**6,
        requests=10**9,
        errors=10**6,
        latency_p50_seconds=0.123,
        latency_p99_seconds=0.456,
        confidence_mean=0.789,
        label_counts=(10**6,) * 10,
    )


def _speaker(lab: Lab) -> Speaker:
    database = open_database(MEMORY, clock=lab.time)
    return Speaker(
        lab.identity("dev-1"),
        sequence=Sequence(database),
        windows=ReplayWindows(database),
        clock=lab.time,
    )


def test_arithmetic_of_the_how_to() -> None:
    """The example of docs/how-to/links.md: 100 MB a month, a heartbeat every five minutes."""
    idle = idle_bytes_a_day(keepalive=30, heartbeat=300, report=3600, check=86_400)
    assert round(idle / 1e6, 2) == 1.12
    assert round(31 * idle / 1e6) == 35


# ---- a release check -------------------------------------------------------------------------------------------


def door(state: Path, database: Database, **link: object) -> Link:
    settings = EdgeSettings(link=LinkSettings(timezone="UTC", **link))  # type: ignore[arg-type]
    found = Link(plan_of(settings), database, SystemClock(), None, state)
    found.begin([])
    return found


def source(state: Path, link: Link) -> ChildReleases:
    return ChildReleases(state, SystemClock(), graphs=lambda: "", checked=lambda: None, link=link)


def nothing(_: str) -> frozenset[str]:
    return frozenset()


@pytest.fixture
def state(aggregator: Aggregator, tmp_path: Path) -> Path:
    enrol(aggregator.token(), tmp_path / "state", clock=SystemClock())
    return tmp_path / "state"


def test_check_without_news_costs_no_more_than_the_arithmetic_says(state: Path) -> None:
    link = door(state, open_database(MEMORY), metered=True, bytes_per_day=10**9)
    releases = source(state, link)
    releases.fetch(1, nothing, {})  # the first brings all metadata
    before = link.look().spent_day
    assert before > 5_000, "a TLS handshake and metadata, counted in the child"
    releases.fetch(1, nothing, {})
    assert 2_000 < link.look().spent_day - before <= CHECK_BYTES
    assert not (state / NOTE_NAME).exists()


def test_shut_link_looks_at_the_metadata_and_leaves_the_release_where_it_is(state: Path) -> None:
    opens = datetime.now(UTC) + timedelta(hours=12)
    window = f"{opens:%H:%M}-{opens + timedelta(minutes=2):%H:%M}"
    link = door(state, open_database(MEMORY), windows=[window])
    assert not link.view.is_open
    offer = source(state, link).fetch(0, nothing, {})
    assert (offer.release_version, offer.files) == (1, {})
    assert offer.keys.tenant == "acme"
    assert link.look().spent_day < 60_000
