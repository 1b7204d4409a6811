"""One life of a device: the real agent on a real folder, over a link instead of a network.

Laws of the file: as `fleet/chaos/device.py`: nothing of the agent is replaced but what is outside of its machine, and
its self-test, which runs inline; it is asked for an answer in every turn. Imports nothing that a device does not have.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_agent.agent import Agent
from edge_agent.enrolment.identity import Identity
from edge_agent.ports import JobKind
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.install import TufReleases
from edge_agent.release.selftest import InlineSelfTest
from edge_agent.release.slots import Slots
from edge_agent.rounds.worker import InlineWorker
from edge_agent.runtime import Runtime
from edge_agent.settings import EdgeSettings
from edge_agent.store.storage import open_database
from edge_agent.store.time_floor import FlooredClock
from edge_agent.vitals.machine import NoMachine
from fleet.real_chaos.link import Begin, Heard, Leave, LinkTransport, NodeEnd, Note, Rest, Turn
from fleet.virtual import VirtualTime
from wire.enrolment import OnlineKey
from wire.errors import DataError, ModelError, RoundError, StorageError
from wire.messages import Evaluation, Update, decode_body, encode_body
from wire.primitives import SigningKey, sha256

JOB_SECONDS = 1.0
_OWED_SECONDS = 86_400.0
_TICK_SECONDS = 1e-3
_MOST_FAILURES = 100
"""In one turn: an agent that fails so often without time passing would do so for ever."""


class DeviceFacts(msgspec.Struct, frozen=True):
    """What a device's life is told beside its folder.

    Attributes:
        window: what is asked for an answer, float32.
        train: windows and labels to learn from, the first time it starts.
        owes: bodies of updates that it has made before it starts.
    """

    device: str
    tenant: str
    fleet: str
    key: bytes
    tuf_root: bytes
    kem: tuple[OnlineKey, ...]
    orders: tuple[OnlineKey, ...]
    settings: dict[str, Any]
    window: list[float]
    train: list[tuple[list[float], int, str]] = []
    owes: list[bytes] = []


def identity_of(facts: DeviceFacts) -> Identity:
    """Who it is; no files, no TLS."""
    return Identity(
        tenant=facts.tenant,
        fleet=facts.fleet,
        device=facts.device,
        url_enrol="https://chaos:1",
        url_api="https://chaos:2",
        tls_name="chaos",
        mqtt_host="chaos",
        mqtt_port=1883,
        mqtt_tls=False,
        ca_pem=b"",
        certificate_pem=b"",
        update_key=SigningKey.from_bytes(facts.key),
        tuf_root=facts.tuf_root,
        kem=facts.kem,
        orders=facts.orders,
    )


def live_device(begin: Begin, end: NodeEnd) -> None:
    """Opens the folder, starts the agent and does what the world asks for, until it asks to leave.

    Raises:
        ShoalError: the agent cannot start, as its process would end.
    """
    facts = msgspec.convert(begin.facts, DeviceFacts)
    settings = msgspec.convert(facts.settings, EdgeSettings)
    folder, time = Path(begin.folder), VirtualTime()
    time.advance_to(begin.now)
    database = open_database(folder, max_bytes=settings.storage.database_bytes, clock=time)
    clock = FlooredClock(time, database)
    identity, engine, transport = identity_of(facts), Runtime(kept=4), LinkTransport(end)
    agent = Agent(
        settings,
        identity,
        transport=transport,
        releases=TufReleases(folder / "tuf", identity, MemoryFetcher(end.fetch), clock),
        clock=clock,
        worker=_NotingWorker(time, end),
        rng=random.Random(f"{facts.device} {begin.life}"),
        database=database,
        slots=Slots(folder, quarantine=database.quarantine),
        selftest=InlineSelfTest(engine),
        engine=engine,
        machine=NoMachine(),
    )
    for encoded in facts.owes:
        _owe(agent, decode_body(encoded, Update), time.now())
    agent.start()
    for window, label, split in facts.train:
        agent.observe(np.asarray(window, np.float32), label, split)  # type: ignore[arg-type]
    _Loop(agent, transport, end, time, np.asarray(facts.window, np.float32)).run()


def _owe(agent: Agent, body: Update, now: float) -> None:
    """An order that was accepted, and its update in the outbox."""
    parts, deadline = agent.parts, now + _OWED_SECONDS
    parts.orders.accept(body.order_id, "train", body.run, body.round_number, now)
    number = body.round_number
    parts.outbox.put(body.update_id, body.order_id, body.run, number, "up", encode_body(body), now, deadline)


class _NotingWorker(InlineWorker):
    """Tells the world what a job has made, before the agent knows it."""

    def __init__(self, time: VirtualTime, end: NodeEnd) -> None:
        super().__init__(time.later, lambda result: JOB_SECONDS)
        self._end = end

    def submit(self, kind: JobKind, key: bytes, work: Any, done: Any) -> None:
        def noted() -> Any:
            value = work()
            body = value[0] if isinstance(value, tuple) else value
            if isinstance(body, Update | Evaluation):
                made = (body.update_id.hex(), body.order_id.hex(), sha256(encode_body(body)).hex())
                self._end.send(Note("made", made))
            return value

        super().submit(kind, key, noted, done)


class _Loop:
    """The agent's loop, turn by turn."""

    def __init__(
        self, agent: Agent, transport: LinkTransport, end: NodeEnd, time: VirtualTime, window: Any
    ) -> None:
        self._agent = agent
        self._transport = transport
        self._end = end
        self._time = time
        self._window = window
        self._failures = 0

    def run(self) -> None:
        self._rest()
        while (frame := self._end.receive()) is not None:
            match frame:
                case Heard():
                    self._transport.take(frame.event())
                case Turn(now):
                    self._time.advance_to(now)
                    self._turn()
                    self._rest()
                case Leave():
                    self._agent.stop()
                    return
                case _:
                    return

    def _turn(self) -> None:
        """As `Agent.run_forever`: what fails is logged, and it goes on."""
        agent, failures = self._agent, 0
        is_busy = True
        while is_busy:
            is_busy = self._time.run_due() > 0
            try:
                agent.pump()
                agent.tick()
            except StorageError as error:
                is_busy = True
                failures += 1
                if failures > _MOST_FAILURES:
                    raise RoundError(f"the loop spins: {error}") from error
        self._failures += failures

    def _rest(self) -> None:
        agent = self._agent
        wake = self._time.now() + max(0.0, agent.wake_at - self._time.monotonic())
        due = self._time.next_due()
        wake = wake if due is None else min(wake, due)
        # What was due is done; between the two clocks a wake can be rounded to now, again and again.
        self._end.send(Rest(max(wake, self._time.now() + _TICK_SECONDS), self._facts()))

    def _facts(self) -> dict[str, Any]:
        agent = self._agent
        model = agent.parts.serving.current
        facts: dict[str, Any] = {"release": 0, "failures": self._failures}
        facts["quarantined"] = agent.parts.database.quarantine.kept_total
        facts["recovered"] = agent.parts.database.recovered_total
        with contextlib.suppress(StorageError):
            facts["open"] = agent.parts.outbox.depth()
        if model is None:
            return facts
        try:
            facts["release"] = agent.infer(self._window).release_version
        except (DataError, ModelError) as error:
            facts["silent"] = str(error)
        return facts
