"""The running aggregator: broker, HTTPS ports, event loop and clean stop around one `Aggregator`.

Laws of the file: wiring and order only; the transport's thread may only enqueue, everything else of the aggregator runs
on the caller's thread; the queue between them is bounded, and when it is full the broker is not read (`incoming.py`).
The caller holds the state folder's lock `service`. Source: docs/architecture.md.
"""

from __future__ import annotations

import os
import queue
import secrets
import signal
import ssl
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Protocol

from cloud_server.aggregator import Aggregator
from cloud_server.assembly import Base, assemble
from cloud_server.broker import open_broker
from cloud_server.db.rounds import load_run
from cloud_server.deployment import Deployment
from cloud_server.enrolment.ca import ensure_client_files
from cloud_server.https import HttpsFront
from cloud_server.incoming import Incoming
from cloud_server.listening import check_ports
from cloud_server.metrics_reading import EventQueue, read_health, read_metrics
from cloud_server.operators.front import OperatorsFront
from cloud_server.pace import Pace
from cloud_server.partials import Partials
from cloud_server.registry import AGGREGATOR_NAME
from cloud_server.release.authority_watch import AuthorityWatch
from cloud_server.release.key_watch import KeyWatch
from cloud_server.rounds.runner import RoundRunner
from cloud_server.run_setup import PreparedRun, open_run, prepare_run
from cloud_server.service_health import Surroundings, look_after
from cloud_server.standby import check_standby, held_lease, wait_for_lease
from process.logs import get_logger
from process.metrics_port import MetricsPort
from process.pulse import Pulse
from process.service_manager import ServiceManager
from process.vitals import register_vitals
from wire.backoff import Backoff
from wire.errors import ConfigurationError, ModelError, ShoalError, StorageError
from wire.transport.mqtt import MqttTransport

_log = get_logger("cloud.service")

EVENTS_PER_TICK = 256
LONGEST_WAIT_SECONDS = 1.0
POLL_SECONDS = 1.0
STALE_SECONDS = 900.0
"""A loop that is away for longer hangs: a fold of a large model, or refinement, takes minutes."""
CLAIM_SECONDS = 1.0
"""So long a look at who writes counts: nothing leaves a process that stood still for longer before it has looked."""
RETRY_SECONDS = 60.0
"""How long a model that cannot be used is left alone before it is looked at again."""
# There is one aggregator, so a broker that comes back is not overrun by it, and the whole fleet waits for it.
_RECONNECTING = Backoff(first_seconds=0.25, cap_seconds=1.0)


class StopSignal(Protocol):
    """What ends the service; `threading.Event` is one."""

    def is_set(self) -> bool: ...

    def set(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Running:
    """Where a started service can be reached; `metrics_port` or `operators_port` 0: nowhere."""

    public_port: int
    device_port: int
    broker_host: str
    broker_port: int
    metrics_port: int = 0
    operators_port: int = 0


def run(
    deployment: Deployment,
    *,
    serverapp: str = "",
    standby: bool = False,
    stop: StopSignal | None = None,
    service_manager: ServiceManager | None = None,
    on_ready: Callable[[Running], None] = lambda running: None,
) -> int:
    """Serves until `stop` is set, or until SIGTERM or SIGINT when this is the main thread.

    Args:
        serverapp: `module:app` of a stock Flower ServerApp that drives the rounds; over the settings' own.
        standby: first wait until no other aggregator on this database holds the lease.
        service_manager: is told that the loop lives.
        on_ready: called once, when every port is open.

    Raises:
        ConfigurationError: (operator) a setting cannot be used.
        TrustError: (operator) the machine's clock cannot be right.
        ModelError: the model, or the operator's data, cannot be loaded.
        TransportError: a port or the broker cannot be had.
        KeyboardInterrupt: SIGINT ended it; everything is closed.
    """
    if stop is None:
        stop = _Signalled()
    with ExitStack() as stack:
        stack.callback(deployment.close)
        pulse = Pulse(deployment.clock, stale_seconds=STALE_SECONDS, manager=service_manager)
        fence = None
        if standby:
            check_standby(deployment.settings)
            # What is wrong is said now, and not when it is needed.
            prepare_run(deployment, serverapp)
            fence = wait_for_lease(deployment, stop, pulse)
            if fence is None:
                return 0
            # From the first moment on: what is opened now may take longer than the lease.
            stack.enter_context(_lease(deployment, fence, pulse))
        deployment.check_clock()
        # Before anything is started: what cannot be loaded is one error, and no device saw half a service.
        prepared = prepare_run(deployment, serverapp)
        check_ports(deployment.settings)
        base = _open_base(deployment, fence)
        if fence is None and deployment.database.is_server:
            stack.enter_context(_lease(deployment, base.fence, pulse))
        broker_host, broker_port = stack.enter_context(open_broker(deployment))
        transport = _transport(deployment, broker_host, broker_port)
        loop = _Loop(deployment, base, transport, stop, serverapp, pulse)
        stack.callback(loop.close)
        if prepared is not None:
            loop.begin(prepared)
        metrics_port = loop.open_metrics(stack)
        broker_url = deployment.broker_url(broker_host, broker_port)
        front = stack.enter_context(HttpsFront(deployment, broker_url=broker_url, pulse=pulse))
        loop.count_enrolments(front)
        following = _FollowingTransport(deployment, transport)
        loop.follow_authorities(front.follow, following.follow)
        loop.renewers += [front.show_anew, following.show_anew]
        if deployment.settings.broker.tls and deployment.settings.broker.kind != "external":
            # Who watches the broker sees another file, and starts it with that.
            loop.renewers.append(lambda: deployment.server_files("broker"))
        operators_port = 0
        if deployment.settings.operators.listen:
            operators = OperatorsFront(
                deployment,
                deployment.settings.operators.listen,
                pulse=pulse,
                findings=lambda: loop.health.findings,
            )
            operators_port = stack.enter_context(operators).port
            loop.follow_authorities(operators.follow)
            loop.renewers.append(operators.show_anew)
            loop.enders.append(operators.begin_stop)
        ready = Running(
            front.public_port, front.device_port, broker_host, broker_port, metrics_port, operators_port
        )
        ports = {"public_port": ready.public_port, "device_port": ready.device_port, "broker": broker_port}
        _log.info("service_ready", **ports, metrics=metrics_port, operators=operators_port)
        on_ready(ready)
        loop.enders.append(front.begin_stop)
        with deployment.notary.running():
            loop.run()
    if isinstance(stop, _Signalled) and stop.is_interrupt:
        raise KeyboardInterrupt
    return 0


class _Loop:
    """The event loop: events from the transport's queue, ticks in between, and a model that may come later."""

    def __init__(
        self,
        deployment: Deployment,
        base: Base,
        transport: MqttTransport,
        stop: StopSignal,
        serverapp: str,
        pulse: Pulse,
    ) -> None:
        self._deployment = deployment
        self._base = base
        self._stop = stop
        self._events = Incoming(transport.pause)
        settings = deployment.settings
        self._may_speak = _Claim(base, deployment.clock_guard.check).check
        self._cloud = assemble(
            base,
            transport,
            tenant=settings.tenant,
            fleet=settings.fleet,
            ring=settings.enrolment.ring,
            slot_bytes=settings.broker.slot_bytes,
            silent_seconds=settings.broker.silent_seconds,
            pace=Pace(settings.pace.connections_per_second, settings.pace.downloads_per_second),
            may_send=self._may_speak,
        )
        clocks = self._cloud.aggregator.device_clocks
        deployment.devices_ahead = lambda: clocks.ahead(base.clock.now(), base.clock.monotonic())
        self._cloud.aggregator.inbox.keep_partials(Partials(deployment.folder.partials, base.clock))
        self._key_watch = KeyWatch(
            deployment.key_folder,
            base.repository,
            downlink=self._cloud.downlink,
            inbox=self._cloud.aggregator.inbox,
            clock=base.clock,
            tenant=settings.tenant,
            fleet=settings.fleet,
        )
        authorities = AuthorityWatch(deployment.authority_folder, base.repository, base.clock)
        self._followers: list[Callable[[], None]] = [authorities.tick]
        self._complained = ""
        self._next_poll = 0.0
        self._next_model_look = 0.0
        self._runner: RoundRunner | None = None
        self._is_paused = False
        self._serverapp = serverapp
        self._stop_app: Callable[[], None] = lambda: None
        self._pulse = pulse
        self.enders: list[Callable[[], None]] = []
        self.renewers: list[Callable[[], object]] = []
        self._queue = EventQueue(self._events.waiting, lambda: self._events.paused_total)
        self.health = look_after(
            deployment,
            Surroundings(
                self._cloud,
                self._queue,
                self._events.room,
                transport.rejoin,
                self.renewers,
                lambda: self._runner,
            ),
        )

    def open_metrics(self, stack: ExitStack) -> int:
        """Lets metrics be read where the settings want that; returns the port, 0 for nowhere."""
        settings = self._deployment.settings
        metrics = self._cloud.metrics
        register_vitals(metrics.registry, self._base.clock.now())
        read_metrics(
            metrics,
            self._base,
            self._cloud,
            ring=settings.enrolment.ring,
            authority=self._deployment.folder.authority,
            runner=lambda: self._runner,
            events=self._queue,
        )
        read_health(metrics, self.health, self._cloud.aggregator.fleet_health)
        if not settings.metrics.listen:
            return 0
        return stack.enter_context(MetricsPort(metrics.registry, settings.metrics.listen, self._pulse)).port

    def count_enrolments(self, front: HttpsFront) -> None:
        """Lets metrics say what came of requests at the HTTPS ports."""
        self._cloud.metrics.enrolments.read_from(front.enrolment.counts)

    def follow_authorities(self, *followers: Callable[[], None]) -> None:
        """What is asked every second to show and trust the authorities of now."""
        self._followers += followers

    def run(self) -> None:
        """Serves until the stop signal."""
        aggregator = self._cloud.aggregator
        aggregator.start(self._events.put)
        try:
            wake = self._base.clock.now()
            while not self._stop.is_set():
                self._beat()
                self._may_speak()
                self._poll()
                wait = min(max(wake - self._base.clock.now(), 0.0), LONGEST_WAIT_SECONDS)
                self._take(aggregator, wait)
                wake = aggregator.tick()
        finally:
            self._pulse.stop()
            # Before anything that takes a while: requests under way end beside it.
            for begin_stop in self.enders:
                begin_stop()
            self.close()
            aggregator.stop()
            _log.info("service_stopped", waiting_events=self._events.waiting())

    def _beat(self) -> None:
        """Once round. Ready is a service that hears devices and can commit what they say."""
        is_connected = self._cloud.aggregator.link.away_since is None
        view = self._runner.view() if self._runner is not None else None
        doing = f"round {view.round_number}, {view.phase}" if view is not None else "no run"
        self._pulse.beat(
            is_ready=is_connected and self.health.is_database_well,
            status=f"{'connected' if is_connected else 'no broker'}, {doing}",
        )

    def close(self) -> None:
        """Ends a ServerApp's thread, if there is one. Safe to call twice."""
        stop_app, self._stop_app = self._stop_app, lambda: None
        stop_app()

    def _take(self, aggregator: Aggregator, wait: float) -> None:
        """Handles what is there, at most so much that ticks keep coming."""
        for _ in range(EVENTS_PER_TICK):
            try:
                event = self._events.take(wait)
            except queue.Empty:
                return
            wait = 0.0
            if event is not None:
                aggregator.handle(event)

    def _poll(self) -> None:
        """Looks at what commands changed in the database while the service runs."""
        now = self._base.clock.monotonic()
        if now < self._next_poll:
            return
        self._next_poll = now + POLL_SECONDS
        self._key_watch.tick()
        self._follow()
        self.health.tick()
        if self._runner is None:
            self._look_for_model(now)
            return
        with self._base.database.read() as connection:
            row = load_run(connection, self._deployment.settings.run.name)
        is_paused = row is not None and row.status == "paused"
        if is_paused != self._is_paused:
            self._note_paused(is_paused)
            self._runner.set_paused(is_paused)
            _log.info("run_paused" if is_paused else "run_resumed")

    def _follow(self) -> None:
        try:
            for follower in self._followers:
                follower()
            self._complained = ""
        except ShoalError as error:
            if str(error) != self._complained:
                self._complained = str(error)
                _log.error("authorities_not_followed", error=str(error), hint=error.hint)

    def _note_paused(self, is_paused: bool) -> None:
        self._is_paused = is_paused
        self._cloud.metrics.paused.set(float(is_paused))

    def _look_for_model(self, now: float) -> None:
        """Begins the run once a model is imported (`shoal-cloud model import` works while the service runs).

        What cannot be used then does not end the service, whose devices answer and enrol without a run.
        """
        if now < self._next_model_look:
            return
        try:
            prepared = prepare_run(self._deployment, self._serverapp)
            if prepared is not None:
                self.begin(prepared)
        except (ConfigurationError, ModelError) as error:
            self._next_model_look = now + RETRY_SECONDS
            _log.error("run_not_begun", error=str(error), hint=error.hint)

    def begin(self, prepared: PreparedRun) -> None:
        """Publishes the model where the ring has none, and begins its run, or goes on with it.

        Raises:
            ConfigurationError: (operator) the run exists with another model, or its strategy does not go with it.
        """
        publisher, settings, bundle = self._base.publisher, self._deployment.settings, prepared.bundle
        ring, name = settings.enrolment.ring, settings.run.name
        runner, stop_app = open_run(prepared, self._base, self._cloud, wake=lambda: self._events.put(None))
        with self._base.database.read() as connection:
            known = load_run(connection, name)
        runner.resume(bundle.checkpoint(), settings.run.seed or secrets.randbelow(2**63 - 1) + 1)
        if publisher.current_version(ring) == 0:
            publisher.publish(publisher.propose_bundle(bundle).version, ring)
        if known is None and settings.run.paused:
            runner.set_paused(True)
        self._note_paused(known.status == "paused" if known is not None else settings.run.paused)
        self._runner, self._stop_app = runner, stop_app
        self._cloud.aggregator.begin(runner)
        _log.info("run_begun", run=name, model=bundle.manifest.model, strategy=settings.run.strategy)


def _lease(deployment: Deployment, fence: int, pulse: Pulse) -> AbstractContextManager[None]:
    """Held while the loop comes round. A process that lost it ends like one that is killed: another one speaks, and
    what is queued here for the broker must not leave."""
    seconds = deployment.settings.standby.lease_seconds
    lost = partial(os._exit, StorageError.exit_code)
    return held_lease(deployment.database, fence, seconds, is_alive=lambda: pulse.is_alive, on_lost=lost)


class _Claim:
    """Asked before each packet leaves, and in each turn before events are taken: a process that was stopped for a while
    must look before it speaks again, and one whose clock was set must not sign by it."""

    def __init__(self, base: Base, check_clock: Callable[[], None]) -> None:
        self._database = base.database
        self._clock = base.clock
        self._check_clock = check_clock
        self._looked_at = -CLAIM_SECONDS

    def check(self) -> None:
        self._check_clock()
        now = self._clock.monotonic()
        if now - self._looked_at >= CLAIM_SECONDS:
            self._database.check_claim()
            self._looked_at = now


def _open_base(deployment: Deployment, fence: int | None = None) -> Base:
    fence = deployment.database.claim_writer() if fence is None else fence
    deployment.fence = fence
    return Base(
        deployment.database,
        deployment.artefacts,
        deployment.keys,
        deployment.clock,
        deployment.registry,
        deployment.repository,
        fence,
        deployment.notary,
    )


def _broker_context(deployment: Deployment) -> ssl.SSLContext:
    """Mutual TLS as the aggregator, with a certificate that is made for it."""
    authorities = deployment.authorities
    certificate, key = ensure_client_files(
        authorities.issuing, deployment.folder.authority, AGGREGATOR_NAME, now=deployment.clock.now()
    )
    tls = ssl.create_default_context(cadata=authorities.bundle_pem)
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    tls.load_cert_chain(certificate, key)
    return tls


class _FollowingTransport:
    """Comes to the broker as a client of the authorities of now; the broker's own restart makes it come again."""

    def __init__(self, deployment: Deployment, transport: MqttTransport) -> None:
        self._deployment = deployment
        self._transport = transport
        self._used = deployment.authorities

    def follow(self) -> None:
        if self._deployment.authorities is not self._used:
            self.show_anew()

    def show_anew(self) -> None:
        """With a certificate of today, from the next connection on."""
        self._used = self._deployment.authorities
        if self._deployment.settings.broker.tls:
            self._transport.use_tls(_broker_context(self._deployment))


def _transport(deployment: Deployment, host: str, port: int) -> MqttTransport:
    tls = _broker_context(deployment) if deployment.settings.broker.tls else None
    return MqttTransport(
        AGGREGATOR_NAME,
        host,
        port,
        tls=tls,
        inflight_window=64,
        queue_packets=4096,
        backoff=_RECONNECTING,
    )


class _Signalled(threading.Event):
    """Set by SIGTERM or SIGINT, when this is the main thread; the service then ends well in either case."""

    def __init__(self) -> None:
        super().__init__()
        self.is_interrupt = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.is_interrupt = number == signal.SIGINT
        self.set()
