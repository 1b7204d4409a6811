"""A real device: the agent with its real adapters, from the state folder.

Laws of the file: one agent per state folder (a lock file says so); TLS goes to the name and CA of the
identity, never to those of the machine; a certificate is renewed before it expires, and used without a
restart. Source: docs/architecture.md, "The agent".
"""

from __future__ import annotations

import os
import random
import ssl
from pathlib import Path
from typing import Any

from edge_agent import identity as identity_files
from edge_agent.agent import Agent
from edge_agent.freed_memory import give_back
from edge_agent.identity import Identity
from edge_agent.lazy_engine import LazyEngine
from edge_agent.lock import lock_state
from edge_agent.release_child import ChildReleases
from edge_agent.selftest import ChildSelfTest
from edge_agent.settings import EdgeSettings
from edge_agent.slots import Slots
from edge_agent.status import STATUS_NAME
from edge_agent.storage import open_database
from edge_agent.time_floor import BUILT, FlooredClock
from edge_agent.worker import ThreadWorker
from process.clock import SystemClock
from process.logs import get_logger
from wire.transport.mqtt import MqttTransport

_log = get_logger("edge_agent.device")


class NamedContext(ssl.SSLContext):
    """A client context that expects one name, whatever address the connection goes to."""

    expected_name = ""

    def wrap_socket(self, sock: Any, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        return super().wrap_socket(sock, *arguments, **{**options, "server_hostname": self.expected_name})


def broker_context(identity: Identity) -> NamedContext:
    """Mutual TLS to the broker, with the certificate and the CA of the identity.

    Raises:
        TrustError: a certificate or key cannot be used.
    """
    context = NamedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.expected_name = identity.tls_name
    context.load_verify_locations(cadata=identity.ca_pem.decode("ascii"))
    context.load_cert_chain(identity.certificate_path, identity.tls_key_path)
    return context


class CertificateInUse:
    """Follows the certificate on disk, which a release check renews.

    What is on disk decides, not what the check says: one that renews and then fails must not leave the broker with
    a certificate that ends.
    """

    def __init__(self, identity: Identity, tls: ssl.SSLContext | None, transport: MqttTransport) -> None:
        self._identity = identity
        self._tls = tls
        self._transport = transport
        self._used = identity.certificate_pem

    def follow(self) -> None:
        """Takes a new certificate into use: the broker is left and joined again with it. From any thread."""
        try:
            present = self._identity.certificate_path.read_bytes()
            if present == self._used:
                return
            if self._tls is not None:
                self._tls.load_cert_chain(self._identity.certificate_path, self._identity.tls_key_path)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            _log.warning("certificate_unusable", reason=str(error))
            return
        self._used = present
        _log.info("certificate_renewed")
        if self._tls is not None:
            self._transport.rejoin("a new certificate")


def open_agent(folder: Path, settings: EdgeSettings) -> Agent:
    """An agent on a state folder, ready to start.

    Raises:
        ConfigurationError: not enrolled, or another agent runs there.
        TrustError: a key or certificate cannot be used.
        StorageError: the folder cannot be used.
    """
    identity = identity_files.load(folder)
    lock = lock_state(folder)
    machine = SystemClock()
    database = open_database(folder, max_bytes=settings.storage.database_bytes, clock=machine)
    clock = FlooredClock(machine, database, built=BUILT)
    slots = Slots(folder, quarantine=database.quarantine)
    tls = broker_context(identity) if identity.mqtt_tls else None

    def graphs() -> str:
        contents = slots.current()
        return contents.graphs_sha256 if contents is not None else ""

    transport = MqttTransport(
        identity.device,
        identity.mqtt_host,
        identity.mqtt_port,
        tls=tls,
        keepalive_seconds=settings.network.keepalive_seconds,
    )
    certificate = CertificateInUse(identity, tls, transport)
    engine = LazyEngine()

    def rest() -> None:
        engine.release()
        give_back()

    return Agent(
        settings,
        identity,
        transport=transport,
        releases=ChildReleases(folder, clock, graphs=graphs, checked=certificate.follow),
        clock=clock,
        worker=ThreadWorker(rest),
        rng=random.SystemRandom(),
        database=database,
        slots=slots,
        selftest=ChildSelfTest(
            folder / "selftest",
            memory_bytes=settings.release.selftest_memory_bytes,
            timeout_seconds=settings.release.selftest_seconds,
        ),
        engine=engine,
        status_file=folder / STATUS_NAME,
        on_close=lambda: os.close(lock),
    )
