"""A real device: the agent with its real adapters, from the state folder.

Laws of the file: one agent per state folder (a lock file says so); a device that has a model answers, whatever became
of its identity; TLS goes to the name and CA of the
identity, never to those of the machine; a certificate is renewed before it expires, and used without a
restart. Source: docs/architecture.md, "The agent".
"""

from __future__ import annotations

import os
import random
import shutil
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_agent.agent import Agent
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.identity import Identity
from edge_agent.enrolment.late_identity import LateIdentity, LateTransport, nobody
from edge_agent.freed_memory import give_back
from edge_agent.lazy_engine import LazyEngine
from edge_agent.link.door import Link, plan_of
from edge_agent.lock import lock_state
from edge_agent.release.child import ChildReleases
from edge_agent.release.flight import FlightRecorder, go_back_after_deaths
from edge_agent.release.selftest import ChildSelfTest
from edge_agent.release.slots import FOLDER_NAME as SLOTS_NAME
from edge_agent.release.slots import Slots
from edge_agent.rounds.kept_heads import FolderChunks
from edge_agent.rounds.worker import ThreadWorker
from edge_agent.settings import EdgeSettings
from edge_agent.store.storage import open_database
from edge_agent.store.time_floor import BUILT, FlooredClock
from edge_agent.vitals.machine import RealMachine
from edge_agent.vitals.status import STATUS_NAME
from process.clock import SystemClock
from process.logs import get_logger
from process.service_manager import ServiceManager
from wire.errors import ShoalError, TrustError
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
    try:
        context.load_verify_locations(cadata=identity.ca_pem.decode("ascii"))
        context.load_cert_chain(identity.certificate_path, identity.tls_key_path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise TrustError(f"the certificates in {identity.folder} cannot be used: {error}") from error
    return context


class CertificateInUse:
    """Follows the certificate and the authorities on disk, which a release check renews.

    What is on disk decides, not what the check says: one that renews and then fails must not leave the broker with
    a certificate that ends.
    """

    def __init__(self, identity: Identity, tls: ssl.SSLContext | None, transport: MqttTransport) -> None:
        self._identity = identity
        self._tls = tls
        self._transport = transport
        self._used = identity.certificate_pem
        self._trusted = identity.ca_pem

    def follow(self) -> None:
        """Takes what is new into use: the broker is left and joined again with it. From any thread."""
        try:
            present, trusted = (
                self._identity.certificate_path.read_bytes(),
                self._identity.ca_path.read_bytes(),
            )
            if (present, trusted) == (self._used, self._trusted):
                return
            if self._tls is not None:
                self._take(present, trusted)
        except (OSError, ValueError, TrustError) as error:  # ssl.SSLError is an OSError
            _log.warning("certificate_unusable", reason=str(error))
            return
        if trusted != self._trusted:
            _log.info("authorities_changed")
        if present != self._used:
            _log.info("certificate_renewed")
        self._used, self._trusted = present, trusted
        if self._tls is not None:
            self._transport.rejoin("a new certificate")

    def _take(self, present: bytes, trusted: bytes) -> None:
        if trusted == self._trusted and self._tls is not None:
            self._tls.load_cert_chain(self._identity.certificate_path, self._identity.tls_key_path)
            return
        # A context that once trusted an authority never forgets it.
        self._tls = broker_context(replace(self._identity, ca_pem=trusted, certificate_pem=present))
        self._transport.use_tls(self._tls)


class _Voice:
    """What speaks to the broker in the name of a device, once its identity is there."""

    def __init__(self, settings: EdgeSettings) -> None:
        self._settings = settings
        self._certificate: CertificateInUse | None = None
        self.transport = LateTransport()

    def use(self, identity: Identity) -> None:
        """Makes it; raises `TrustError` for certificates that cannot be used."""
        tls = broker_context(identity) if identity.mqtt_tls else None
        transport = MqttTransport(
            identity.device,
            identity.mqtt_host,
            identity.mqtt_port,
            tls=tls,
            keepalive_seconds=plan_of(self._settings).keepalive_seconds,
            backoff=self._settings.backoff(),
            rng=random.SystemRandom(),
        )
        self._certificate = CertificateInUse(identity, tls, transport)
        self.transport.become(transport)

    def follow(self) -> None:
        """A release check has ended, which may have renewed the certificate."""
        if self._certificate is not None:
            self._certificate.follow()


def open_agent(
    folder: Path, settings: EdgeSettings, *, service_manager: ServiceManager | None = None
) -> Agent:
    """An agent on a state folder, ready to start.

    Args:
        service_manager: is told that the agent lives, where it is a process of its own.

    Raises:
        ConfigurationError: not enrolled, or another agent runs there.
        TrustError: a key or certificate cannot be used, and there is no model that could answer without them.
        StorageError: the folder cannot be used.
    """
    _look_at_identity(folder)
    lock = lock_state(folder)
    machine = SystemClock()
    database = open_database(folder, max_bytes=settings.storage.database_bytes, clock=machine)
    clock = FlooredClock(machine, database, built=BUILT)
    slots = Slots(folder, quarantine=database.quarantine)
    voice = _Voice(settings)
    late = LateIdentity(folder, voice.use, database.quarantine)
    try:
        identity = _identity_of(late, folder, slots)
    except ShoalError:
        database.close()
        os.close(lock)
        raise
    recorder = FlightRecorder(folder)
    go_back_after_deaths(recorder, slots, database, clock.now)

    def graphs() -> str:
        contents = slots.current()
        return contents.graphs_sha256 if contents is not None else ""

    engine = LazyEngine()

    link = Link(plan_of(settings), database, clock, voice.transport, folder)
    releases = ChildReleases(folder, clock, graphs=graphs, checked=voice.follow, link=link)
    trial, heads = folder / "selftest", folder / "heads"

    def rest() -> None:
        engine.release()
        give_back()

    def clear() -> None:
        releases.clear()
        shutil.rmtree(trial, ignore_errors=True)
        shutil.rmtree(heads, ignore_errors=True)

    agent = Agent(
        settings,
        identity,
        transport=voice.transport,
        releases=releases,
        clock=clock,
        worker=ThreadWorker(rest),
        rng=random.SystemRandom(),
        database=database,
        slots=slots,
        selftest=ChildSelfTest(
            trial,
            memory_bytes=settings.release.selftest_memory_bytes,
            timeout_seconds=settings.release.selftest_seconds,
        ),
        engine=engine,
        link=link,
        kept=FolderChunks(heads, clock, max_bytes=2 * settings.training.max_head_bytes),
        machine=RealMachine(folder, identity, rejoin=voice.transport.rejoin, clear=clear),
        service_manager=service_manager,
        status_file=folder / STATUS_NAME,
        on_close=lambda: os.close(lock),
        late_identity=late if late.trouble is not None else None,
    )
    agent.parts.serving.note_in_flight = recorder.note
    return agent


def _look_at_identity(folder: Path) -> None:
    """Raises what is wrong with the identity, before anything is made in a folder that holds no model either."""
    try:
        identity_files.load(folder)
    except ShoalError:
        if not (folder / SLOTS_NAME).is_dir():
            raise


def _identity_of(late: LateIdentity, folder: Path, slots: Slots) -> Identity:
    """The identity; or that of nobody, on a device that has a model to serve."""
    try:
        return late.read()
    except ShoalError:
        if slots.current() is None:
            raise
        return nobody(folder)
