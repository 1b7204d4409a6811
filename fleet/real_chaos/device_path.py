"""The device's path: order, training, outbox, sealing, sending, receipt, evaluation, and the swap to a new release.

Laws of the file: the device is a process of its own on real files; the aggregator in this process is whole, so what is
wrong at the end is the device's; what counts is what the device told before it committed, what lies on its disk after
each end (read by a connection of the books), and what the aggregator has. Source: docs/architecture.md, laws 2 and 3.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cloud_server.assembly import Assembled, Base, assemble, make_run_parts, open_base
from cloud_server.db.engine import open_database
from cloud_server.rounds.runner import RoundRunner
from cloud_server.secure.opening import make_runner
from edge_agent.store.storage import DATABASE_NAME as DEVICE_DATABASE
from fleet.chaos.store import ChaosArtefacts
from fleet.real_chaos.cloud_life import DATABASE_NAME, holdout_of, run_config
from fleet.real_chaos.link import Begin
from fleet.real_chaos.paths import SEED, Findings, Workshop, device_facts, play
from fleet.real_chaos.victim import Nursery, Strike, Victim
from fleet.simulated_device import FLEET, TENANT
from fleet.virtual import VirtualTime
from wire.errors import RoundError
from wire.transport.memory import MemoryBroker, MemoryTransport

SOUND: Final = ("stored", "folded", "discarded")
LATE: Final = ("refused", "round_closed")
"""A device that is gone is not waited for; what it brings later has its end, and a reason."""
GIVEN_UP: Final = ("refused", "expired", "evicted", "destroyed")
INSTALL_SECONDS: Final = 100.0
RELEASES: Final = 2


class Aggregator:
    """A real aggregator in memory, with a run for one device."""

    def __init__(
        self, bench: Workshop, time: VirtualTime, broker: MemoryBroker, folder: Path, rounds: int
    ) -> None:
        template = bench.template
        self.database_path = folder / DATABASE_NAME
        self.database_path.write_bytes(template.database)
        store = ChaosArtefacts(
            dict(template.files), lambda point: None, lambda fault: None, lambda key, data: None
        )
        self._database = open_database(f"sqlite:///{self.database_path}")
        self._time = time
        self.base: Base = open_base(self._database, store, template.keys, time, tenant=TENANT, fleet=FLEET)
        transport = MemoryTransport(broker, "aggregator", queue_packets=100_000)
        self.cloud: Assembled = assemble(self.base, transport, tenant=TENANT, fleet=FLEET)
        self.runner: RoundRunner | None = None
        if rounds:
            config = run_config(rounds, 1)
            plan, ports = make_run_parts(self.base, self.cloud, template.bundle, config, holdout_of(SEED))
            self.runner = make_runner(
                plan, ports, None, registry=self.base.registry, downlink=self.cloud.downlink
            )
            self.runner.resume(template.bundle.checkpoint(), SEED)
            self.cloud.aggregator.begin(self.runner)
        self._wake = 0.0
        self._heard = 0
        self.cloud.aggregator.start(self._handle)

    @property
    def is_finished(self) -> bool:
        return self.runner is None or self.runner.is_finished

    def read(self, path: str) -> bytes | None:
        return self.base.repository.read(path.lstrip("/"))

    def settle(self) -> int:
        heard, self._heard = self._heard, 0
        self._wake = self.cloud.aggregator.tick()
        return heard

    def next_moment(self) -> float:
        return self._wake

    def close(self) -> None:
        self._database.close()

    def _handle(self, event: Any) -> None:
        self._heard += 1
        self.cloud.aggregator.handle(event)


class DevicePath:
    """Plays the device's path."""

    role = "device"

    def __init__(self, bench: Workshop, nursery: Nursery) -> None:
        self._bench = bench
        self._nursery = nursery
        self._identity = bench.template.identities[0]
        self.prepared = bench.root / "prepared-device"
        self._prepare()

    def play(self, **options: Any) -> Findings:
        """One play from the prepared folder to the end of the path.

        Args:
            options: of `Victim`: what befalls it.
        """
        folder = self._bench.root / "device"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.prepared, folder)
        strike = options.get("strike")
        # A start that cannot read its keys just now ends, and the next one reads them: they are not taken for lost.
        books = DeviceBooks(folder, may_end=isinstance(strike, Strike) and strike.act == "EIO")
        with self.stage(folder, rounds=1, on_death=books.read, **options) as (time, broker, cloud, victim):
            victim.start()

            def is_over() -> bool:
                facts = victim.lives.facts
                is_through = facts.get("release") == RELEASES and facts.get("open") == 0
                return cloud.is_finished and is_through

            is_through = play(time, broker, cloud, victim, is_over)
            if victim.leave() and not victim.was_killed:
                books.findings.wrong(f"it did not stop politely: {victim.lives.codes}")
            books.read()
            if not is_through:
                books.findings.wrong(f"not at its end after {time.monotonic():.0f} s: {victim.lives.facts}")
            books.close(cloud.database_path, victim)
        return books.findings

    def _prepare(self) -> None:
        """Makes the folder that all plays begin from: the first release is installed, samples are there."""
        folder = self.prepared
        folder.mkdir()
        with self.stage(folder, rounds=0, is_taught=False) as (time, broker, aggregator, victim):
            victim.start()
            play(time, broker, aggregator, victim, lambda: time.monotonic() > INSTALL_SECONDS)
            if victim.leave() or victim.lives.facts.get("release") != 1:
                raise RoundError("the prepared device does not serve", facts=victim.lives.facts)

    @contextmanager
    def stage(
        self,
        folder: Path,
        *,
        rounds: int,
        is_taught: bool = True,
        **options: Any,
    ) -> Iterator[tuple[VirtualTime, MemoryBroker, Aggregator, Victim]]:
        """A device on a folder and an aggregator for it, neither of them begun."""
        with tempfile.TemporaryDirectory(dir=self._bench.root) as name:
            time = VirtualTime()
            broker = MemoryBroker(time, session_queue_packets=10_000)
            aggregator = Aggregator(self._bench, time, broker, Path(name), rounds)
            facts = device_facts(self._identity, is_taught=is_taught)
            victim = Victim(
                self._nursery,
                lambda life, now: Begin("device", str(folder), now, life, facts),
                self._identity.device,
                time=time,
                broker=broker,
                read=aggregator.read,
                **options,
            )
            try:
                yield time, broker, aggregator, victim
            finally:
                victim.kill()
                aggregator.close()


@dataclass
class DeviceBooks:
    """What a device has owed, and what became of it.

    Attributes:
        kept: ids that were in an outbox on the disk.
    """

    folder: Path
    may_end: bool = False
    findings: Findings = field(default_factory=Findings)
    kept: set[str] = field(default_factory=set)
    ends: dict[str, tuple[str, str]] = field(default_factory=dict)

    def read(self) -> None:
        """Looks at a copy of the outbox as it lies on the disk now."""
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as name:
            for path in self.folder.glob(f"{DEVICE_DATABASE}*"):
                if not path.name.endswith("-shm"):
                    shutil.copy(path, name)
            with closing(sqlite3.connect(Path(name) / DEVICE_DATABASE)) as reader:
                try:
                    rows = reader.execute("SELECT hex(update_id), state, reason FROM outbox").fetchall()
                except sqlite3.Error as error:
                    self.findings.wrong(f"the outbox cannot be read: {error}")
                    return
        now = {update.lower(): (state, reason) for update, state, reason in rows}
        for update in self.kept - now.keys():
            self.findings.lost += 1
            self.findings.wrong(f"{update} is gone from the outbox")
        self.kept |= now.keys()
        self.ends = now

    def close(self, cloud: Path, victim: Victim) -> None:
        """Compares the outbox with the aggregator's books."""
        found, made = self.findings, defaultdict[str, set[str]](set)
        for what, *values in victim.lives.notes:
            if what == "made":
                made[values[0]].add(values[2])
        rows = read_updates(cloud)
        found.made = len(self.kept)
        for update, (state, reason) in self.ends.items():
            if (state, reason) == LATE and rows[update].state == "late":
                continue
            if state in GIVEN_UP or state == "open":
                found.wrong(f"{update} ended as {state}: {reason}")
            if update not in rows or rows[update].state not in SOUND:
                found.lost += 1
                found.wrong(f"{update} is {state} on the device and nowhere in the aggregator")
        for update, row in rows.items():
            if row.body_sha256 not in made[update]:
                found.altered += 1
                found.wrong(f"{update} is not what the device made")
        for order, count in Counter(row.order_id for row in rows.values()).items():
            if count > 1:
                found.doubled += count - 1
                found.wrong(f"order {order} has {count} answers")
        for facts in victim.lives.told:
            if "silent" in facts or not facts["release"]:
                found.wrong(f"no answer to an inference: {facts}")
                break
        for reason in () if self.may_end else victim.lives.reasons:
            found.wrong(f"it ended by itself: {reason}")


@dataclass(frozen=True, slots=True)
class CloudRow:
    """A reply as the aggregator has it."""

    order_id: str
    state: str
    body_sha256: str


def read_updates(database: Path) -> dict[str, CloudRow]:
    """What the aggregator has of its devices' replies, by their ids."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
        rows = reader.execute("SELECT update_id, order_id, state, body_sha256 FROM updates").fetchall()
    return {row[0]: CloudRow(*row[1:]) for row in rows}
