"""The launcher, its configurations, and what a broker with TLS lets whom do."""

from __future__ import annotations

import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transport.certificates import Authority
from tests.transport.conftest import KINDS, Join, needs_mosquitto
from tests.transport.mailbox import Mailbox
from wire.errors import BrokerError, ConfigurationError
from wire.topics import Topics
from wire.transport import Connected, Disconnected, Packet, Published, Received
from wire.transport.broker import BrokerLimits, BrokerTls, RunningBroker, probe, start_broker
from wire.transport.broker_access import mosquitto_access
from wire.transport.broker_configuration import (
    BrokerSite,
    Persistence,
    embedded_configuration,
    mosquitto_configuration,
)
from wire.transport.mqtt import MqttTransport

TOPICS = Topics("acme", "north")


@pytest.mark.parametrize("kind", KINDS)
def test_started_broker_answers_and_stopped_one_does_not(kind: str, tmp_path: Path) -> None:
    with start_broker(kind, folder=tmp_path / "new") as broker:  # type: ignore[arg-type]
        assert (broker.kind, broker.host, broker.is_alive()) == (kind, "127.0.0.1", True)
        probe(broker.host, broker.port)
    assert not broker.is_alive()
    broker.stop()
    with pytest.raises(BrokerError, match="does not answer"):
        probe(broker.host, broker.port, timeout_seconds=2)


@pytest.mark.parametrize("kind", KINDS)
def test_broker_ends_when_its_parent_is_killed(kind: str, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from wire.transport.broker import start_broker\n"
        f"broker = start_broker({kind!r}, folder=pathlib.Path({str(tmp_path)!r}))\n"
        "print(broker.process_id, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdin is not None
    broker_id = int(parent.stdout.readline())
    watch = os.pidfd_open(broker_id)
    parent.kill()
    parent.wait()
    ended, _, _ = select.select([watch], [], [], 15)
    os.close(watch)
    assert ended, "the broker outlived its parent"
    parent.stdout.close()
    parent.stdin.close()


def test_auto_takes_the_embedded_broker_where_mosquitto_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wire.transport.broker.find_mosquitto", lambda: None)
    with start_broker(folder=tmp_path) as broker:
        assert broker.kind == "embedded"
    with pytest.raises(BrokerError, match="not on PATH") as raised:
        start_broker("mosquitto", folder=tmp_path)
    assert "apt install mosquitto" in raised.value.hint
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BrokerError, match="no MQTT broker"):
        start_broker(folder=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_broker_that_no_longer_answers_is_started_anew_on_its_port(
    kind: str, join: Join, tmp_path: Path
) -> None:
    with start_broker(kind, folder=tmp_path) as broker:  # type: ignore[arg-type]
        _, events = join(broker.port, "x")
        events.next(Connected)
        port = broker.port
        assert broker.answers()
        assert not broker.revive()
        broker.kill()
        assert not broker.answers()
        assert broker.revive()
        assert (broker.port, broker.is_alive()) == (port, True)
        events.next(Connected)


def test_frozen_broker_is_started_anew_although_its_process_lives(tmp_path: Path) -> None:
    with start_broker("embedded", folder=tmp_path) as broker:
        os.kill(broker.process_id, signal.SIGSTOP)
        assert broker.is_alive()
        assert broker.revive()
        probe(broker.host, broker.port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "fleet.example.com"])
@pytest.mark.parametrize(
    ("kind", "why"),
    [("auto", "lets everybody in"), ("mosquitto", "lets everybody in"), ("embedded", "neither")],
)
def test_broker_without_tls_listens_on_this_machine_only(
    kind: str, why: str, host: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=why) as raised:
        start_broker(kind, folder=tmp_path / "new", host=host)  # type: ignore[arg-type]
    assert host in str(raised.value)
    assert "127.0.0.1" in raised.value.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_broker_listens_on_every_name_of_this_machine(kind: str, host: str, tmp_path: Path) -> None:
    with start_broker(kind, folder=tmp_path, host=host) as broker:  # type: ignore[arg-type]
        probe(host, broker.port)


def test_embedded_broker_refuses_what_it_cannot_protect(tmp_path: Path) -> None:
    tls = BrokerTls(tmp_path, tmp_path, tmp_path, "acme", "north")
    with pytest.raises(BrokerError, match="verifies no certificates"):
        start_broker("embedded", folder=tmp_path, tls=tls)
    with pytest.raises(ConfigurationError, match="rabbit"):
        start_broker("rabbit", folder=tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_port_in_use_is_an_error(kind: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match="already in use"):
            start_broker(kind, folder=tmp_path, port=port)  # type: ignore[arg-type]


@pytest.mark.parametrize("mosquitto", [pytest.param("", marks=needs_mosquitto)])
def test_broker_that_ends_at_its_start_is_an_error_with_the_end_of_its_log(
    mosquitto: str, tmp_path: Path
) -> None:
    no_files = BrokerTls(tmp_path / "ca", tmp_path / "certificate", tmp_path / "key", "acme", "north")
    Authority(tmp_path, "ca").ca_file.rename(tmp_path / "ca")
    with pytest.raises(BrokerError, match=r"ended at its start: .*(certificate|Error)"):
        start_broker("mosquitto", folder=tmp_path, tls=no_files)


@pytest.mark.parametrize("answer", [b"", b"\x20\x03\x00\x87\x00", b"HTTP/1.1 400\r\n"])
def test_probe_refuses_a_server_that_does_not_accept_us(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            peer.recv(100)
            peer.sendall(answer)
            peer.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(BrokerError, match="does not answer"):
            probe("127.0.0.1", server.getsockname()[1], timeout_seconds=5)
        thread.join()


def test_embedded_configuration_is_local_bounded_and_version_5_only() -> None:
    limits = BrokerLimits(max_packet_bytes=300_000, max_inflight=10, max_connections=7)
    document = tomllib.loads(embedded_configuration("127.0.0.1", 1883, limits))
    assert document["v5"]["1"]["listen"] == "127.0.0.1:1883"
    assert document["v5"]["1"]["connections"]["max_payload_size"] == 300_000
    assert document["router"]["max_connections"] == 7
    assert "v4" not in document
    assert "shared" not in str(document)


def site(persistence: Persistence = "interval") -> BrokerSite:
    return BrokerSite("127.0.0.1", 1883, Path("/data"), Path("/access"), persistence=persistence)


@pytest.mark.parametrize("persistence", ["interval", "change", "off"])
def test_mosquitto_configuration_leaves_no_limit_at_its_default(persistence: Persistence) -> None:
    text = mosquitto_configuration(site(persistence), BrokerLimits(), None)
    stated = {line.split()[0] for line in text.splitlines() if line and not line.startswith("#")}
    assert {
        "max_queued_messages",
        "max_queued_bytes",
        "max_inflight_messages",
        "max_packet_size",
        "max_keepalive",
        "max_qos",
        "memory_limit",
        "persistence",
        "set_tcp_nodelay",
        "persistent_client_expiration",
    } <= stated
    assert ("autosave_interval" in stated) == (persistence != "off")
    assert "user" not in stated


def test_every_option_of_mosquitto_says_why() -> None:
    tls = BrokerTls(Path("/ca"), Path("/pem"), Path("/key"), "acme", "north", revocation_file=Path("/crl"))
    for part in mosquitto_configuration(site(), BrokerLimits(), tls).split("\n\n"):
        assert part.startswith("# ")


@pytest.mark.parametrize("name", ["", "a/b", "a b", "+", "a\nuser b"])
def test_access_file_refuses_names_that_could_open_more_topics(name: str) -> None:
    for words in ((name, "north", ["a"]), ("acme", name, ["a"]), ("acme", "north", [name])):
        with pytest.raises(ConfigurationError):
            mosquitto_access(*words)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", params=[pytest.param("mosquitto", marks=needs_mosquitto)])
def secured(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    certificate_file, key_file = authority.issue("broker")
    tls = BrokerTls(authority.ca_file, certificate_file, key_file, "acme", "north", ("aggregator",))
    with start_broker(folder=tmp_path_factory.mktemp("secured"), tls=tls) as broker:
        yield broker


def test_client_without_a_certificate_of_our_authority_is_refused(
    secured: RunningBroker, authority: Authority, join: Join, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    own_ca_foreign_key = authority.context(None)
    own_ca_foreign_key.load_cert_chain(*stranger.issue("dev1"))
    for context in (authority.context(None), own_ca_foreign_key):
        _, events = join(secured.port, "dev1", tls=context)
        reason = events.next(Disconnected).reason
        assert "refused us in TLS" in reason or "closed" in reason
        assert not [event for event in events.seen if isinstance(event, Connected)]
    _, events = join(secured.port, "plain")
    events.next(Disconnected)


def test_client_refuses_a_broker_of_another_authority(
    secured: RunningBroker, join: Join, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    _, events = join(secured.port, "dev1", tls=stranger.context("dev1"))
    assert "certificate verify failed" in events.next(Disconnected).reason
    with pytest.raises(BrokerError, match="certificate verify failed"):
        probe("127.0.0.1", secured.port, tls=stranger.context(None))


def test_probe_completes_with_a_certificate_of_its_own(secured: RunningBroker, authority: Authority) -> None:
    probe("127.0.0.1", secured.port, tls=authority.context("probe"))
    probe("127.0.0.1", secured.port, tls=authority.context(None), handshake_only=True)
    with pytest.raises(BrokerError):
        probe("127.0.0.1", secured.port, tls=authority.context(None))


def test_device_writes_under_its_own_name_only(
    secured: RunningBroker, authority: Authority, join: Join
) -> None:
    _, cloud = join(secured.port, "aggregator", *TOPICS.cloud_filters(), tls=authority.context("aggregator"))
    cloud.next(Connected)
    device, events = join(secured.port, "dev1", tls=authority.context("dev1"))
    events.next(Connected)
    sha = "0" * 64
    own = [TOPICS.by_device(kind, "dev1") for kind in ("st", "tm", "jn", "rs", "es", "ir")]
    own += [TOPICS.upload("s0", "dev1", 3, 0), TOPICS.need("dev1", sha)]
    foreign = [TOPICS.by_device(kind, "dev2") for kind in ("st", "tm", "jn", "rs", "es", "ir")]
    foreign += [
        TOPICS.upload("s0", "dev2", 3, 0),
        TOPICS.need("dev2", sha),
        TOPICS.upload("dev1", "dev2", 3, 0),
    ]
    foreign += [TOPICS.by_device(kind, "dev1") for kind in ("ak", "cm", "ea")]
    foreign += [TOPICS.invitation(None), TOPICS.announcement("stable"), TOPICS.blob_chunk(sha, 0)]
    foreign += ["fl/1/other/north/st/dev1", "elsewhere"]
    for topic in foreign + own:
        device.publish(Packet(topic, topic.encode()))
    verdicts = [event.accepted for event in events.take(Published, len(foreign) + len(own))]
    assert verdicts == [False] * len(foreign) + [True] * len(own)
    assert [event.packet.topic for event in cloud.take(Received, len(own))] == own


def test_device_reads_what_is_for_all_and_for_it_only(
    secured: RunningBroker, authority: Authority, join: Join
) -> None:
    """By delivery: mosquitto grants subscriptions under which nothing will come."""
    everything = (
        *TOPICS.device_filters("dev1", "stable"),
        *TOPICS.device_filters("dev2", "stable"),
        "#",
        "fl/#",
    )
    _, device = join(secured.port, "dev1", *everything, tls=authority.context("dev1"))
    device.next(Connected)
    cloud, events = join(secured.port, "aggregator", tls=authority.context("aggregator"))
    events.next(Connected)
    hidden = [TOPICS.by_device(kind, "dev2") for kind in ("ak", "cm", "ea")]
    shown = [TOPICS.by_device(kind, "dev1") for kind in ("ak", "cm", "ea")]
    shown += [TOPICS.invitation(None), TOPICS.announcement("stable"), TOPICS.blob_chunk("0" * 64, 0)]
    for topic in hidden + shown:
        cloud.publish(Packet(topic, b"x"))
    assert all(event.accepted for event in events.take(Published, len(hidden) + len(shown)))
    topics: set[str] = set()
    while topics < set(shown):
        topics.add(device.next(Received).packet.topic)
    assert topics == set(shown)


def test_client_id_is_the_certificates_name_and_cannot_be_chosen(
    secured: RunningBroker, authority: Authority, join: Join
) -> None:
    """A valid certificate must not take another device's session."""
    _, victim = join(secured.port, "dev5", TOPICS.by_device("cm", "dev5"), tls=authority.context("dev5"))
    victim.next(Connected)
    _, thief = join(secured.port, "dev5", TOPICS.by_device("cm", "dev5"), tls=authority.context("dev6"))
    assert not thief.next(Connected).session_present
    cloud, events = join(secured.port, "aggregator", tls=authority.context("aggregator"))
    events.next(Connected)
    cloud.publish(Packet(TOPICS.by_device("cm", "dev5"), b"order"))
    assert victim.until_payload(b"order")
    assert not [event for event in thief.drain() if isinstance(event, Received)]
    assert not [event for event in victim.seen if isinstance(event, Disconnected)]


def test_large_packets_pass_through_tls_in_both_directions(
    secured: RunningBroker, authority: Authority, join: Join
) -> None:
    """More than one TLS record a packet: what hides in the TLS layer must be drained."""
    _, inbox = join(secured.port, "dev7", TOPICS.by_device("cm", "dev7"), tls=authority.context("dev7"))
    inbox.next(Connected)
    cloud, events = join(secured.port, "aggregator", tls=authority.context("aggregator"))
    events.next(Connected)
    sent = [bytes([number]) * 120_000 for number in range(40)]
    for payload in sent:
        cloud.publish(Packet(TOPICS.by_device("cm", "dev7"), payload))
    assert [event.packet.payload for event in inbox.take(Received, 40)] == sent


def test_wills_pass_the_access_rules(secured: RunningBroker, authority: Authority, join: Join) -> None:
    _, cloud = join(secured.port, "aggregator", f"{TOPICS.base}/st/+", tls=authority.context("aggregator"))
    cloud.next(Connected)
    will = Packet(TOPICS.by_device("st", "dev8"), b"gone", retain=True)
    device, events = join(secured.port, "dev8", tls=authority.context("dev8"), will=will)
    events.next(Connected)
    device.drop()
    assert cloud.until_payload(b"gone")


def test_frozen_broker_is_noticed_and_the_client_comes_back(join: Join, tmp_path: Path) -> None:
    with start_broker("embedded", folder=tmp_path) as broker:
        _, events = join(broker.port, "x", keepalive_seconds=1)
        events.next(Connected)
        os.kill(broker.process_id, signal.SIGSTOP)
        try:
            assert events.next(Disconnected).reason
        finally:
            os.kill(broker.process_id, signal.SIGCONT)
        events.next(Connected)


def test_tls_context_without_a_host_name_match_is_refused(
    secured: RunningBroker, authority: Authority
) -> None:
    context = authority.context(None)
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    client = MqttTransport("x", "127.0.0.2", secured.port, tls=context)
    events = Mailbox()
    client.start(events, filters=[])
    assert events.next(Disconnected).reason
    client.stop()
