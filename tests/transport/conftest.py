"""Brokers for the transport tests: the embedded one always, mosquitto where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.transport.mailbox import Mailbox
from wire.backoff import Backoff
from wire.transport import Packet
from wire.transport.broker import RunningBroker, start_broker
from wire.transport.mqtt import MqttTransport
from wire.transport.selector import SelectorLoop

HAS_MOSQUITTO = (
    shutil.which("mosquitto", path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin") is not None
)
needs_mosquitto = [
    pytest.mark.mosquitto,
    pytest.mark.skipif(not HAS_MOSQUITTO, reason="mosquitto is not installed"),
]
KINDS = [pytest.param("embedded"), pytest.param("mosquitto", marks=needs_mosquitto)]

FAST = Backoff(first_seconds=0.02, cap_seconds=0.2)

Client = tuple[MqttTransport, Mailbox]
Join = Callable[..., Client]


@pytest.fixture(scope="module", params=KINDS)
def broker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningBroker]:
    with start_broker(request.param, folder=tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module", params=[pytest.param("mosquitto", marks=needs_mosquitto)])
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with start_broker("mosquitto", folder=tmp_path_factory.mktemp("mosquitto")) as running:
        yield running


@pytest.fixture
def loop() -> Iterator[SelectorLoop]:
    loop = SelectorLoop("test-mqtt")
    loop.start()
    yield loop
    loop.stop()
    assert not loop.is_running


@pytest.fixture
def join(loop: SelectorLoop) -> Iterator[Join]:
    """Starts clients on one shared loop and stops them at the end of the test."""
    clients: list[MqttTransport] = []

    def start(
        port: int,
        client_id: str,
        *filters: str,
        will: Packet | None = None,
        qos: int = 1,
        muted: Sequence[str] = (),
        **options: object,
    ) -> Client:
        given = {"loop": loop, "backoff": FAST, "host": "127.0.0.1", **options}
        client = MqttTransport(client_id, port=port, **given)  # type: ignore[arg-type]
        mailbox = Mailbox()
        client.mute(muted)
        client.start(mailbox, filters=[(name, qos) for name in filters], will=will)
        clients.append(client)
        return client, mailbox

    yield start
    for client in clients:
        client.stop()
