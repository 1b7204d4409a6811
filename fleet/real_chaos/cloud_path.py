"""The aggregator's path: collecting, storing, receipts, fold, commit, evaluation, gate and signing.

Laws of the file: the aggregator is a process of its own on a real database and a real folder; its three devices are
real agents in this process and whole, so what is wrong at the end is the aggregator's. What devices were told is
compared with the rows on the disk after each end, and the last head with that of a play in which nothing was struck:
nothing that was owed is missing from it, nothing is in it twice, and the strategy's momentum is what it was.
Source: docs/architecture.md, laws 3 and 6.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cloud_server.artefacts import Artefacts
from cloud_server.release.tuf_repository import TufRepository
from edge_agent.agent import Agent
from edge_agent.ports import JobResult
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.install import SharedTufReleases, TufReleases
from edge_agent.release.memory_slots import SharedReleases
from edge_agent.release.selftest import InlineSelfTest
from edge_agent.runtime import Runtime
from fleet.real_chaos.cloud_life import ARTEFACTS_NAME, DATABASE_NAME
from fleet.real_chaos.link import Begin
from fleet.real_chaos.paths import DEVICES, SEED, Findings, Workshop, play, settings, split_of
from fleet.real_chaos.victim import Nursery, Victim
from fleet.simulated_device import Shared, device_key, make_agent, make_identity
from fleet.virtual import START, VirtualTime
from wire.errors import TransportError
from wire.messages import Evaluation, Update, encode_body
from wire.transport.memory import MemoryBroker

ROUNDS: Final = 2
FULL_SECONDS: Final = (1.5, 60.0)
SOUND: Final = ("stored", "folded", "discarded")
REFUSED: Final = ("refused", "late")


class Devices:
    """The whole side: agents in memory, and what they have made."""

    def __init__(
        self,
        bench: Workshop,
        folder: Path,
        time: VirtualTime,
        broker: MemoryBroker,
        is_up: Callable[[], bool],
    ) -> None:
        self.made: dict[str, set[str]] = defaultdict(set)
        self._time = time
        engine, template = Runtime(kept=16), bench.template
        repository = TufRepository(Artefacts.in_folder(folder / ARTEFACTS_NAME), template.keys, time)

        def read(path: str) -> bytes | None:
            if not is_up():
                raise TransportError("the aggregator does not answer")
            return repository.read(path.lstrip("/"))

        fetcher = MemoryFetcher(read)
        first = template.identities[0]
        reader = make_identity("reader", device_key(0, "reader"), first.tuf_root, first.kem, first.orders)
        shared = Shared(
            time=time,
            broker=broker,
            releases=SharedTufReleases(TufReleases(folder / "staging", reader, fetcher, time), fetcher),
            slots=SharedReleases(),
            engine=engine,
            selftest=InlineSelfTest(engine),
            settings=settings(),
            tuf_root=first.tuf_root,
            kem=first.kem,
            orders=first.orders,
        )
        self.agents = [self._make(shared, each.device) for each in template.identities]

    def start(self) -> None:
        for agent in self.agents:
            agent.start()

    def settle(self) -> int:
        busy = 0
        for agent in self.agents:
            agent.pump()
            if agent.wake_at <= self._time.monotonic():
                agent.tick()
                busy += 1
        return busy

    def next_moment(self) -> float:
        return min(agent.wake_at for agent in self.agents) + START

    def close(self) -> None:
        for agent in self.agents:
            agent.stop()

    @property
    def owe(self) -> bool:
        """Whether a device has an update that nobody has acknowledged."""
        return any(agent.parts.outbox.depth() for agent in self.agents)

    def told(self) -> dict[str, str]:
        """How each update ended on its device, or `open`."""
        found: dict[str, str] = {}
        for agent in self.agents:
            rows = agent.parts.database.read("SELECT hex(update_id), state FROM outbox")
            found |= {update.lower(): state for update, state in rows}
        return found

    def _make(self, shared: Shared, device: str) -> Agent:
        agent = make_agent(
            shared,
            device,
            seed=0,
            cost=self._note,
            notify=lambda: None,
            behind=lambda worker: worker,
        )
        split = split_of(device)
        for x, y, part in ((split.train_x, split.train_y, "train"), (split.val_x, split.val_y, "val")):
            for window, label in zip(x, y, strict=True):
                agent.observe(window, int(label), part)  # type: ignore[arg-type]
        return agent

    def _note(self, result: JobResult) -> float:
        body = result.value[0] if isinstance(result.value, tuple) else result.value
        if isinstance(body, Update | Evaluation):
            self.made[body.update_id.hex()].add(hashlib.sha256(encode_body(body)).hexdigest())
        return 1.0


class CloudPath:
    """Plays the aggregator's path."""

    role = "cloud"

    def __init__(self, bench: Workshop, nursery: Nursery) -> None:
        self._bench = bench
        self._nursery = nursery
        self.prepared = bench.root / "prepared-cloud"
        self.head = ""
        self._prepare()

    def play(
        self,
        *,
        folder: Path | None = None,
        full: tuple[Callable[[], None], Callable[[], None]] | None = None,
        **options: Any,
    ) -> Findings:
        """One play from the prepared folder to the end of the run.

        Args:
            folder: where it lies.
            full: fills its disk a moment after the start, and makes room some time later.
            options: of `Victim`: what befalls it.
        """
        folder = folder or self._bench.root / "cloud"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.prepared, folder)
        with self.stage(folder, **options) as (time, broker, devices, victim, books):
            books.may_end = full is not None or options.get("strike") is not None
            victim.start()
            devices.start()
            for seconds, call in zip(FULL_SECONDS, full or (), strict=False):
                time.later(seconds, call)

            def is_over() -> bool:
                return bool(victim.lives.facts.get("is_finished")) and not devices.owe

            is_through = play(time, broker, devices, victim, is_over)
            if victim.leave() and not victim.was_killed:
                books.findings.wrong(f"it did not stop politely: {victim.lives.codes}")
            books.read()
            if not is_through:
                books.findings.wrong(f"not at its end after {time.monotonic():.0f} s: {victim.lives.facts}")
            books.close()
            head = str(victim.lives.facts.get("head"))
            self.head = self.head or head
            if head != self.head and not books.failed_rounds:
                books.findings.wrong("the head is not what it is without faults")
                books.findings.doubled += 1
        return books.findings

    def _prepare(self) -> None:
        template = self._bench.template
        self.prepared.mkdir()
        (self.prepared / DATABASE_NAME).write_bytes(template.database)
        for key, data in template.files.items():
            path = self.prepared / ARTEFACTS_NAME / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    @contextmanager
    def stage(
        self, folder: Path, **options: Any
    ) -> Iterator[tuple[VirtualTime, MemoryBroker, Devices, Victim, CloudBooks]]:
        """An aggregator on a folder and devices for it, none of them begun."""
        time = VirtualTime()
        broker = MemoryBroker(time, session_queue_packets=10_000)
        facts = {
            "bundle": str(self._bench.template.bundle.folder),
            "seed": SEED,
            "rounds": ROUNDS,
            "devices": DEVICES,
        }
        lives: list[Victim] = []
        devices = Devices(self._bench, folder, time, broker, lambda: lives[0].is_up)
        books = CloudBooks(folder / DATABASE_NAME, devices)
        victim = Victim(
            self._nursery,
            lambda life, now: Begin("cloud", str(folder), now, life, facts),
            "aggregator",
            time=time,
            broker=broker,
            on_death=books.read,
            **options,
        )
        lives.append(victim)
        books.victim = victim
        try:
            yield time, broker, devices, victim, books
        finally:
            victim.kill()
            devices.close()


@dataclass
class CloudBooks:
    """What devices were told, and what lies on the disk."""

    database: Path
    devices: Devices
    victim: Victim | None = None
    findings: Findings = field(default_factory=Findings)
    rows: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)
    failed_rounds: int = 0
    may_end: bool = False

    def read(self) -> None:
        """Whatever a device was told to be stored is there."""
        sql = "SELECT update_id, state, body_sha256, order_id, device FROM updates"
        try:
            with closing(sqlite3.connect(self.database)) as reader:
                found = {row[0]: row[1:] for row in reader.execute(sql)}
                rounds = reader.execute("SELECT count(*) FROM rounds WHERE state = 'failed'").fetchone()
        except sqlite3.Error as error:
            self.findings.wrong(f"the database cannot be read: {error}")
            return
        self.failed_rounds = rounds[0]
        for update, state in self.devices.told().items():
            is_there = update in found and found[update][0] in SOUND
            if state == "stored" and not is_there:
                self.findings.lost += 1
                self.findings.wrong(f"{update} was acknowledged and is {found.get(update)}")
        for update, before in self.rows.items():
            if update not in found or (before[0] in ("folded", *REFUSED) and found[update] != before):
                self.findings.wrong(f"{update} was {before} and is {found.get(update)}")
        self.rows = found

    def close(self) -> None:
        """The end of a run."""
        found, told = self.findings, self.devices.told()
        found.made = len(told)
        for update, state in told.items():
            if state != "stored":
                found.lost += state != "open"
                found.wrong(f"{update} ended as {state} on its device: {self.rows.get(update)}")
        for update, (state, body, _, _) in self.rows.items():
            if body not in self.devices.made[update]:
                found.altered += 1
                found.wrong(f"{update} is not what its device made")
            if state not in SOUND:
                found.wrong(f"{update} is {state}")
        for order, count in Counter(row[2] for row in self.rows.values()).items():
            if count > 1:
                found.doubled += count - 1
                found.wrong(f"order {order} has {count} answers")
        # A service that cannot write ends, and is started again until it can.
        for reason in self.victim.lives.reasons if self.victim is not None and not self.may_end else ():
            found.wrong(f"it ended by itself: {reason}")
