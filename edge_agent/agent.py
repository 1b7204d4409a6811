"""The agent: one device's answers, samples, and its conversation with the cloud. The public class is `Agent`.

Laws of the file: `infer` never waits for the loop, the disk or the network; everything else happens on one
thread, the one that calls `handle`, `pump` and `tick` (a simulator's, or `run_forever`'s); packets are
verified before they become events; a message's effect and its place in the replay window are one transaction.
Source: docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
from collections.abc import Callable
from pathlib import Path

from edge_agent import events as on
from edge_agent.device_state import State, wake_at
from edge_agent.enrolment.identity import Identity
from edge_agent.enrolment.late_identity import LOOK_SECONDS, LateIdentity, settle_owner
from edge_agent.inference.answers import Answers, Split
from edge_agent.inference.serving import Answer
from edge_agent.link.door import Link
from edge_agent.parts import assemble, take_identity
from edge_agent.ports import Engine, Floats, JobResult, Moment, SelfTest, Worker
from edge_agent.release.slots import SlotStore
from edge_agent.release.source import ReleaseSource
from edge_agent.rounds.kept_heads import KeptChunks
from edge_agent.settings import EdgeSettings
from edge_agent.shell import Shell
from edge_agent.state import step
from edge_agent.store.forget import forget_stores
from edge_agent.store.storage import Database
from edge_agent.uplink.complaints import Complaints
from edge_agent.uplink.hearing import event_of, job_ended, restored_cloud
from edge_agent.uplink.speaker import BlobChunk
from edge_agent.vitals.health import Health
from edge_agent.vitals.machine import Machine, NoMachine
from edge_agent.vitals.metrics import EdgeMetrics
from edge_agent.vitals.metrics_board import MetricsBoard
from edge_agent.vitals.status import status_of, write_status
from process.bounded_queue import BoundedQueue
from process.clock import Clock
from process.logs import get_logger
from process.pulse import Pulse
from process.service_manager import ServiceManager
from wire.errors import EnvelopeError, ShoalError, StorageError
from wire.transport import Connected, Disconnected, Packet, Published, Received, Transport, TransportEvent

_log = get_logger("edge_agent")

_IDLE_SECONDS = 30.0
_STALE_SECONDS = 120.0
"""A loop that is away for longer hangs: what it waits for itself (the disk, a model that is loaded) takes seconds."""

MAX_WAITING = 8192
MAX_WAITING_BYTES = 64 * 2**20
"""Of packets that wait for the loop; what comes on top is dropped, and asked for or said again."""

# What changes something that a person looks at; the rest is written with the next sweep.
_SHOWN = (on.Started, on.Connected, on.Disconnected, on.ReleaseInstalled, on.RolledBack, on.JobDone, on.Tick)

Incoming = TransportEvent | on.Event | JobResult


class Agent:
    """One device.

    Args:
        identity: who it is and whom it trusts.
        releases: where verified releases come from.
        worker: runs training, evaluation and release checks.
        rng: draws the boot id and the jitter's salt; `random.SystemRandom()` on a device, seeded in a
            simulation.
        database: the device's, or one in memory.
        engine: loads models; many agents of one process may share one.
        link: its door, which counts what the connections cost; None: one that counts messages.
        kept: where chunks of heads outlive the process; None: nowhere.
        machine: what is around the agent; a simulated device has none.
        service_manager: is told that the loop lives.
        notify: called, from any thread, when something waits for `pump`.
        status_file: rewritten when something changes that `shoal-edge status` shows; metrics are shown only
            where there is one.
        on_close: called at the end of `stop`.
        late_identity: of a device whose identity cannot be read now: `identity` stands in, and nothing is said to the
            broker before it can.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        identity: Identity,
        *,
        transport: Transport,
        releases: ReleaseSource,
        clock: Clock,
        worker: Worker,
        rng: random.Random,
        database: Database,
        slots: SlotStore,
        selftest: SelfTest,
        engine: Engine,
        link: Link | None = None,
        kept: KeptChunks | None = None,
        machine: Machine | None = None,
        service_manager: ServiceManager | None = None,
        notify: Callable[[], None] = lambda: None,
        status_file: Path | None = None,
        on_close: Callable[[], None] = lambda: None,
        late_identity: LateIdentity | None = None,
    ) -> None:
        self._late_identity = late_identity
        self._settings = settings
        self._transport = transport
        self._notify = notify
        self._status_file = status_file
        self._on_close = on_close
        self._inbox: BoundedQueue[Incoming] = BoundedQueue(MAX_WAITING, MAX_WAITING_BYTES, _weigh)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._complaints = Complaints()
        self.parts = assemble(
            settings,
            identity,
            transport=transport,
            releases=releases,
            clock=clock,
            worker=worker,
            rng=rng,
            database=database,
            slots=slots,
            selftest=selftest,
            engine=engine,
            served_badly=lambda version, reason: self._post(on.ServedBadly(version, reason)),
            link=link,
            kept=kept,
        )
        self.state = State(timing=settings.timing(), salt=rng.getrandbits(32))
        self.health = Health(self.parts, machine or NoMachine(), self._post, lambda: self.state)
        self.pulse = Pulse(clock, stale_seconds=_STALE_SECONDS, manager=service_manager)
        self._shell = Shell(self.parts, self._post, self.health)
        self._answers = Answers(self.parts)
        self._has_joined = True
        self._next_join = 0.0
        self._board = self._make_board()

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        settings: EdgeSettings | None = None,
        *,
        service_manager: ServiceManager | None = None,
    ) -> Agent:
        """The agent of an enrolled device, with its real adapters.

        Use it as a context manager, which runs it in the background; or call `start`, `run_forever` and
        `stop`.

        Args:
            folder: the state folder, as `shoal-edge enroll` made it.
            service_manager: is told that the agent lives, where it is a process of its own.

        Raises:
            ConfigurationError: not enrolled, or another agent runs there.
            TrustError: a key or certificate cannot be used, and there is no model that could answer without them.
            StorageError: the folder cannot be used.
        """
        from edge_agent.device import open_agent

        return open_agent(Path(folder), settings or EdgeSettings(), service_manager=service_manager)

    def __enter__(self) -> Agent:
        """Starts the agent and its loop on a thread of its own."""
        self.start()
        self._thread = threading.Thread(
            target=self.run_forever, args=(self._ended.is_set,), name="shoal-agent", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the loop and stops the agent."""
        self._ended.set()
        self.wake()
        if self._thread is not None:
            self._thread.join()
        self.stop()

    @property
    def identity(self) -> Identity:
        """Who the device is; of nobody while its identity cannot be read."""
        return self.parts.identity

    @property
    def rejected_total(self) -> int:
        """Messages that were dropped, and publications that the broker refused."""
        return self._complaints.total + self._inbox.dropped_total

    # --- answers and samples: any thread ------------------------------------------------------------------

    def infer(self, x: Floats, *, sample_id: str = "") -> Answer:
        """Answers one window with the model that serves now.

        Args:
            x: float32 [*input_shape].
            sample_id: the caller's name for the window, for `feedback`; one is made when it is empty.

        Raises:
            DataError: the window does not fit the model, or is not finite.
            ModelError: there is no model yet, or none could answer.
        """
        return self._answers.infer(x, sample_id)

    def wait_for_model(self, seconds: float | None = None) -> bool:
        """Waits until there is a model to answer with; False when the time ran out."""
        return self.parts.serving.has_model.wait(seconds)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one window; empty without a model."""
        model = self.parts.serving.current
        return model.input_shape if model is not None else ()

    def observe(self, x: Floats, label: int | None = None, split: Split | None = None) -> int:
        """Keeps a window to learn from; raw windows never leave the device.

        Args:
            x: float32 [*input_shape].
            label: the class, when it is known.
            split: `val` keeps it for evaluation only; None decides by the settings' validation share.

        Returns:
            The sample's id in the store.

        Raises:
            DataError: not a window that can be kept, or a label that cannot be.
            StorageError: the disk is full.
        """
        return self._answers.observe(x, label, split)

    def feedback(self, sample_id: str, label: int) -> bool:
        """Says what an answered window really was; it becomes a labelled sample.

        Returns:
            False when the window is not in memory any more.

        Raises:
            DataError: a label that cannot be.
            StorageError: the disk is full.
        """
        return self._answers.feedback(sample_id, label)

    def forget(self, sample_id: int) -> bool:
        """Erases one window that `observe` kept, in every copy of the database; False when it is not there.

        Raises:
            StorageError: the disk is full, or damaged.
        """
        return self.parts.samples.forget(sample_id, self.parts.clock.now())

    def forget_samples(self) -> int:
        """Erases all windows, and what was found damaged, in every copy of the database; returns how many there were.

        What was trained on them and is owed to the cloud still goes there.

        Raises:
            StorageError: something may still be readable.
        """
        parts = self.parts
        now = parts.clock.now()
        return forget_stores(parts.database, parts.samples, parts.outbox, "samples", now).samples

    # --- the loop's thread --------------------------------------------------------------------------------

    def start(self) -> None:
        """Loads the current model, reads what is owed to the cloud, and connects.

        Raises:
            ConfigurationError: the metrics have no address to listen on.
            StorageError: the state folder cannot be used.
            TransportError: the metrics' port is taken.
        """
        if self._board is not None:
            self._board.open()
        self.parts.started_at = self.parts.clock.monotonic()
        contents = self._shell.load_current()
        interrupted: tuple[tuple[bytes, str, int], ...] = ()
        if self._late_identity is not None and self._late_identity.trouble is not None:
            self._miss_identity(self._late_identity.trouble)
        else:
            self._settle_owner()
            interrupted = tuple(
                (order.order_id, order.run, order.round_number) for order in self.parts.orders.unanswered()
            )
        pending = tuple(self.parts.outbox.owed())
        self.parts.link.begin(self.parts.speaker.bulk_filters)
        self._step(
            on.Started(
                release_version=contents.version if contents else 0,
                graphs_sha256=bytes.fromhex(contents.graphs_sha256) if contents else b"",
                on_probation=self.parts.slots.on_probation,
                pending=pending,
                interrupted=interrupted,
                is_link_open=self.parts.link.view.is_open,
            )
        )
        _log.info(
            "agent_started",
            device=self.identity.device,
            release=contents.version if contents else 0,
            owed=len(pending),
        )
        self._join_broker()

    def _join_broker(self) -> None:
        """Connects, once the identity is whole and there are numbers for what is said there: a full disk has none, and
        inference goes on."""
        self._has_joined = False
        try:
            if self._late_identity is not None:
                self._next_join = self.parts.clock.monotonic() + LOOK_SECONDS
                self._become(self._late_identity.read())
            self._next_join = self.parts.clock.monotonic() + _IDLE_SECONDS
            will = self.parts.speaker.birth(self._shell.birth("lost"))
        except StorageError as error:
            _log.error("broker_not_joined", reason=str(error))
            return
        except ShoalError as error:
            self._miss_identity(error)
            return
        self._has_joined = True
        self._transport.start(self._post, filters=self.parts.speaker.filters, will=will)

    def _become(self, identity: Identity) -> None:
        self._late_identity = None
        take_identity(self.parts, identity)
        self.parts.link.begin(self.parts.speaker.bulk_filters)
        self._settle_owner()
        _log.info("identity_whole", device=identity.device)
        self._write_status("running")

    def _settle_owner(self) -> None:
        parts = self.parts
        try:
            lost = settle_owner(parts.identity, parts.database, parts.outbox, parts.orders, parts.clock.now())
        except StorageError as error:
            _log.error("owner_not_settled", reason=str(error))
            return
        for update_id in lost:
            self._post(on.UpdateLost(update_id))

    def _miss_identity(self, error: ShoalError) -> None:
        if str(error) != self.parts.identity_trouble:
            _log.error("identity_unusable", reason=str(error), hint=error.hint)
            self.parts.identity_trouble = str(error)
            self._write_status("running")

    def stop(self) -> None:
        """Says goodbye, ends the worker and the connection, closes the database. Safe to call twice."""
        if self.parts.stopping:
            return
        self.parts.stopping = True
        self.pulse.stop()
        last_words = None
        with contextlib.suppress(StorageError):
            last_words = self.parts.speaker.birth(self._shell.birth("offline"))
        self._transport.stop(last_words)
        self.parts.link.look()
        self.parts.link.keep()
        self.parts.worker.stop()
        self._shell.note_clean_stop()
        self._write_status("stopped")
        if self._board is not None:
            self._board.close()
        self.parts.database.close()
        self._on_close()

    def handle(self, event: Incoming) -> None:
        """Takes one event: a transport's, the state machine's own, or the end of a job."""
        match event:
            case Received(packet):
                self._receive(packet)
            case Connected():
                self.parts.max_packet_bytes = event.max_packet_bytes
                self._step(on.Connected())
            case Disconnected():
                self._complaints.note("broker_away", event.reason)
                self.parts.outgoing.connection_lost()
                self._step(on.Disconnected(event.is_distrust))
            case Published():
                if not event.accepted:
                    self._complaints.add("publish", event.reason)
            case JobResult():
                self._step(self._end_of(event))
            case _:
                self._step(event)
        self.parts.outgoing.pump()

    def pump(self) -> None:
        """Handles everything that waits."""
        while True:
            try:
                event = self._inbox.get(0)
            except queue.Empty:
                return
            self.handle(event)

    def tick(self) -> None:
        """Does what is due by now; cheap when nothing is."""
        now = self.parts.clock.monotonic()
        if not self._has_joined and self._next_join <= now and not self.parts.stopping:
            self._join_broker()
        if wake_at(self.state) <= now:
            self.handle(on.Tick())

    @property
    def wake_at(self) -> float:
        """When `tick` has something to do, on the clock's `monotonic`."""
        return wake_at(self.state) if self._has_joined else min(wake_at(self.state), self._next_join)

    def run_forever(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Runs the loop on this thread until `should_stop`; errors are logged, and it goes on."""
        longest = min(_IDLE_SECONDS, self.pulse.longest_wait_seconds)
        while not should_stop():
            self._beat()
            wait = min(max(self.wake_at - self.parts.clock.monotonic(), 0.0), longest)
            try:
                event = self._inbox.get(wait) if wait > 0 else None
            except queue.Empty:
                event = None
            try:
                if event is not None:
                    self.handle(event)
                self.tick()
            except Exception:  # noqa: BLE001  the outermost loop of the process: it logs and goes on
                _log.exception("event_failed", event=type(event).__name__)

    def wake(self) -> None:
        """Makes `run_forever` look at `should_stop` now; from any thread or signal handler."""
        self._post(on.Tick())

    # --- inside -------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        model = self.parts.serving.current
        where = "connected" if self.state.connected else "not connected"
        doing = f"release {model.release_version if model else 0}, {where}, {self.state.phase}"
        self.pulse.beat(is_ready=model is not None, status=doing, is_alone=bool(self.parts.identity_trouble))

    def _post(self, event: Incoming) -> None:
        if isinstance(event, Received):
            # A loop that is away for long: the broker's word is the one thing that has no end by itself.
            self._inbox.offer(event)
        else:
            self._inbox.put(event)
        self._notify()

    def _now(self) -> Moment:
        return Moment(self.parts.clock.now(), self.parts.clock.monotonic())

    def _step(self, event: on.Event) -> None:
        before, now = self.state, self._now()
        self.state, actions = step(before, event, now)
        self.parts.tally.stepped(event, before, self.state, actions, now.elapsed)
        for action in actions:
            self._shell.perform(action)
        if isinstance(event, _SHOWN):
            self._write_status("running")

    def _make_board(self) -> MetricsBoard | None:
        """Only for a device with a state folder: nobody reads the metrics of a simulated one."""
        if self._status_file is None:
            return None
        metrics, folder = EdgeMetrics(), self._status_file.parent
        metrics.read_from(self.parts, lambda: self.state, lambda: self.rejected_total, folder)
        metrics.read_health(self.health)
        return MetricsBoard(metrics, self._settings.metrics, folder, self.parts.clock, self.pulse)

    def _write_status(self, status: str) -> None:
        if self._status_file is not None and self._board is not None:
            with contextlib.suppress(ShoalError):
                shown = status_of(self.parts, self.state, status)
                shown["health"] = self.health.as_dict()
                shown["metrics"] = self._board.refresh(now=status == "stopped")
                write_status(self._status_file, shown)

    def _receive(self, packet: Packet) -> None:
        size = len(packet.payload) + len(packet.topic)
        self.parts.received_bytes_total += size
        self.parts.link.passed(size)
        try:
            chunk = self.parts.speaker.hear_chunk(packet)
            if chunk is not None:
                self._take_chunk(chunk)
                return
            self._take_message(packet)
            self.parts.clock.note_acknowledgement(self.parts.speaker.acknowledged_until)
        except EnvelopeError as error:
            reason = str(error.facts.get("reason", ""))
            self._complaints.add(packet.topic, reason)
            if reason == "signer":
                self._step(on.KeysUnknown())
        except ShoalError as error:
            self._complaints.add(packet.topic, type(error).__name__)

    def _take_message(self, packet: Packet) -> None:
        """A message's effect, its place in the replay window and what the machine makes of it: all or nothing."""
        before = self.state
        try:
            with self.parts.database.transaction():
                body = self.parts.speaker.hear(packet)
                for event in (restored_cloud(self.parts), event_of(body, self.parts)):
                    if event is not None:
                        self._step(event)
        except StorageError:
            # Nothing of it is kept, so it counts when it is said again: an update whose end did not reach the disk is
            # still owed. A job that it started goes on.
            if self.state.phase == before.phase:
                self.state = before
            raise

    def _end_of(self, result: JobResult) -> on.Event:
        try:
            return job_ended(result, self.parts)
        except ShoalError as error:
            return on.JobFailed(result.kind, result.key, str(error))

    def _take_chunk(self, chunk: BlobChunk) -> None:
        progress = self.parts.heads.add(chunk.sha256, chunk.index, chunk.piece)
        if progress is None:
            return
        event = on.HeadReady if progress.is_complete else on.ChunkArrived
        self._step(event(progress.head_sha256))


def _weigh(event: Incoming) -> int:
    return len(event.packet.payload) if isinstance(event, Received) else 0
