"""1,000 bare MQTT clients that lose mosquitto at the same moment, with and without a spread: what reaches the broker.

Mutual TLS, one process, one selector loop; the broker is killed (SIGKILL) and started again at once on its port. It
is the part of `bench/reconnect.py` that no aggregator slows down. Laws of the file: the same clients twice, only
`MqttTransport.spread` differs; a rate is taken over a second.
"""

from __future__ import annotations

import ssl
import tempfile
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path

from bench.table import Row
from cloud_server.enrolment.ca import CertificateAuthority
from fleet.load.open_files import allow_open_files
from fleet.processes import own_cpu_seconds
from wire.errors import RoundError
from wire.primitives import generate_tls_key, make_csr
from wire.transport import Connected, Disconnected, TransportEvent
from wire.transport.broker import BrokerTls, RunningBroker, start_broker
from wire.transport.mqtt import MqttTransport
from wire.transport.selector import SelectorLoop

CLIENTS = 1_000
SPREAD_SECONDS = 32.0
"""What the aggregator asks of such a fleet at 50 connections a second."""
_LIMIT_SECONDS = 300.0
_NAMES = 50
"""Certificates; clients of one name share theirs, and have ids of their own."""


@dataclass(slots=True)
class _Fleet:
    """What the clients' connections did, by their loop's thread."""

    came: list[float] = field(default_factory=list)
    failed: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def heard(self, event: TransportEvent) -> None:
        with self._changed:
            if isinstance(event, Connected):
                self.came.append(time.monotonic())
                self._changed.notify_all()
            elif isinstance(event, Disconnected):
                self.failed += 1

    def wait(self, count: int) -> None:
        """Until so many connections stood in all."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.came) >= count, _LIMIT_SECONDS):
                raise RoundError(f"{len(self.came)} of {count} connections after {_LIMIT_SECONDS:.0f} s")

    def peak(self, since: int) -> int:
        """Connections within any one second, of those from number `since` on."""
        times = self.came[since:]
        return max(bisect_left(times, moment + 1.0) - number for number, moment in enumerate(times))


@dataclass(frozen=True, slots=True)
class _Return:
    peak: int
    seconds: float
    failed: int
    broker_cpu: float


def measure() -> list[Row]:
    """Rows: without a spread against with one."""
    allow_open_files(2 * CLIENTS)
    with tempfile.TemporaryDirectory(prefix="bench-broker-") as place:
        folder = Path(place)
        authority = CertificateAuthority.create(folder / "ca", name="bench", now=time.time())
        contexts = [_context(folder, authority, number) for number in range(_NAMES)]
        free = _play(folder, authority, contexts, 0.0)
        paced = _play(folder, authority, contexts, SPREAD_SECONDS)
    note = f"{CLIENTS} clients, mutual TLS, mosquitto killed and started at once; spread over {SPREAD_SECONDS:.0f} s"
    return [
        _row("peak of connections in a second", free.peak, paced.peak, note),
        _row("attempts that failed", free.failed, paced.failed),
        _row("CPU of the new broker, s", free.broker_cpu, paced.broker_cpu),
        _row("time until all are back, s", free.seconds, paced.seconds),
    ]


def _row(name: str, free: float, paced: float, note: str = "") -> Row:
    figures = f"{free:.1f} / {paced:.1f}"
    return Row(
        f"{name}: at once / spread", free / max(paced, 1e-9), note=f"{figures}; {note}" if note else figures
    )


def _context(folder: Path, authority: CertificateAuthority, number: int) -> ssl.SSLContext:
    name = f"dev-{number}"
    key = generate_tls_key()
    issued = authority.issue_device(make_csr(key, name).decode("ascii"), name, now=time.time())
    (folder / f"{name}.key").write_bytes(key)
    (folder / f"{name}.pem").write_text(issued.pem, encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=authority.certificate_pem)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


def _broker(folder: Path, authority: CertificateAuthority) -> RunningBroker:
    key = generate_tls_key()
    (folder / "broker.key").write_bytes(key)
    issued = authority.issue_server(key, ("127.0.0.1",), now=time.time())
    (folder / "broker.pem").write_text(issued.pem + authority.certificate_pem, encoding="ascii")
    (folder / "ca.pem").write_text(authority.certificate_pem, encoding="ascii")
    tls = BrokerTls(folder / "ca.pem", folder / "broker.pem", folder / "broker.key", "bench", "fleet")
    broker = start_broker("mosquitto", folder=folder / "broker", tls=tls)
    # Clients of one certificate shall have ids of their own here.
    configuration = folder / "broker" / "broker.conf"
    text = configuration.read_text(encoding="utf-8").replace("use_username_as_clientid true", "")
    configuration.write_text(text, encoding="utf-8")
    broker.restart()
    return broker


def _play(
    folder: Path, authority: CertificateAuthority, contexts: list[ssl.SSLContext], spread: float
) -> _Return:
    fleet, loop = _Fleet(), SelectorLoop("bench")
    loop.start()
    with _broker(folder, authority) as broker:
        clients = [
            MqttTransport(
                f"client-{number}", "127.0.0.1", broker.port, loop=loop, tls=contexts[number % _NAMES]
            )
            for number in range(CLIENTS)
        ]
        for number, client in enumerate(clients):
            client.start(fleet.heard, filters=[(f"fl/1/bench/fleet/ak/dev-{number % _NAMES}", 1)])
            if number % 50 == 49:  # so that the ramp is no measurement of its own
                fleet.wait(number - 49)
        fleet.wait(CLIENTS)
        for client in clients:
            client.spread(spread)
        time.sleep(11.0)  # connections that stood for ten seconds begin their back-off anew
        fleet.failed, began = -CLIENTS, time.monotonic()  # each loses the connection that it has
        broker.kill()
        broker.revive()
        fleet.wait(2 * CLIENTS)
        seconds = time.monotonic() - began
        cpu = own_cpu_seconds(broker.process_id)
        found = _Return(fleet.peak(CLIENTS), seconds, max(0, fleet.failed), cpu)
        loop.stop()
    return found
