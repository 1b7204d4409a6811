"""A device that owes updates and finds its own disk in a bad state: how it is set up, and what must be true at the end.

Law of the file: every update that it owed ends in one way that can be counted: it arrived as it was made, or the device
says that it is destroyed and the aggregator was told; nothing else arrives; inference is answered all the time.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from cloud_server.release.tuf_repository import TufRepository
from edge_agent.settings import EdgeSettings
from edge_agent.store.storage import DATABASE_NAME
from fleet.chaos.store import ChaosArtefacts
from fleet.real_chaos.device_path import DevicePath
from fleet.real_chaos.link import Begin
from fleet.real_chaos.paths import Findings, Workshop, device_facts, play
from fleet.real_chaos.receiver import Receiver
from fleet.real_chaos.victim import Nursery, Victim
from fleet.virtual import VirtualTime
from wire.codec import encode
from wire.messages import Update, encode_body
from wire.primitives import sha256
from wire.transport.memory import MemoryBroker

RUN: Final = "owed"
PARAMS: Final = 1500
"""A body of 6 kB: some lie in one page and its overflow, as those of small models do."""
QUIET_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Owed:
    """An update that a device has made."""

    update_id: str
    order_id: str
    body: bytes

    @property
    def sha256(self) -> str:
        return sha256(self.body).hex()


def make_owed(count: int) -> tuple[Owed, ...]:
    """So many updates, always the same ones."""
    found = []
    for number in range(count):
        rng = np.random.default_rng((7, number))
        vector = rng.standard_normal(PARAMS).astype(np.float32)
        body = Update(
            update_id=sha256(b"owed update %d" % number)[:16],
            order_id=sha256(b"owed order %d" % number)[:16],
            run=RUN,
            round_number=number + 1,
            base_sha256=sha256(b"base"),
            num_examples=10,
            codec="fp32",
            params_size=PARAMS,
            payload=encode(vector, "fp32", rng),
        )
        found.append(Owed(body.update_id.hex(), body.order_id.hex(), encode_body(body)))
    return tuple(found)


@dataclass
class Ended:
    """What a play of a device that owes has shown.

    Attributes:
        arrived: updates that arrived as they were made.
        destroyed: updates that the device counted as destroyed.
        told: of those, how many orders the aggregator was told about.
        quarantined: entries that its lives kept.
    """

    arrived: int = 0
    destroyed: int = 0
    told: int = 0
    quarantined: int = 0
    recovered: int = 0
    findings: Findings = field(default_factory=Findings)


class OwingDevice:
    """Plays devices that owe.

    Args:
        count: how many updates.
    """

    def __init__(self, bench: Workshop, nursery: Nursery, path: DevicePath, *, count: int = 6) -> None:
        self._bench = bench
        self._nursery = nursery
        self._identity = bench.template.identities[0]
        self._start = path.prepared
        self.owed = make_owed(count)
        files = ChaosArtefacts(
            dict(bench.template.files), lambda point: None, lambda fault: None, lambda key, data: None
        )
        self._repository = TufRepository(files, bench.template.keys, VirtualTime())

    def prepare(self, folder: Path, *, is_killed: bool) -> None:
        """A device that owes all of it and has sent it in vain; it was stopped, or killed with its log as it was."""
        shutil.copytree(self._start, folder)
        facts = device_facts(self._identity, owes=[each.body for each in self.owed])
        time, broker, receiver, victim = self._stage(folder, facts, does_answer=False)
        victim.start()
        play(time, broker, receiver, victim, lambda: time.monotonic() > QUIET_SECONDS)
        arrived = len(receiver.arrived.bodies)
        if arrived != len(self.owed):
            raise RuntimeError(f"{arrived} of {len(self.owed)} were sent: {receiver.arrived.unopened}")
        if is_killed:
            victim.kill()
        else:
            victim.leave()

    def play(
        self,
        folder: Path,
        *,
        settings: EdgeSettings | None = None,
        before: Callable[[], None] = lambda: None,
        later: tuple[float, Callable[[], None]] | None = None,
        is_outbox_gone: bool = False,
        may_be_silent: bool = False,
    ) -> Ended:
        """Starts it on a folder that something happened to, and lets it do what it can.

        Args:
            before: called when it has started and nothing has been said yet.
            later: virtual seconds, and what happens then.
            is_outbox_gone: nothing that it owed is left on its disk.
            may_be_silent: nor any model, until it has fetched one.
        """
        facts = device_facts(self._identity, with_settings=settings)
        time, broker, receiver, victim = self._stage(folder, facts, does_answer=True)
        ended = Ended()
        try:
            victim.start()
            before()
            if later is not None:
                time.later(*later)
            seconds = QUIET_SECONDS + (later[0] if later is not None else 0.0)
            play(time, broker, receiver, victim, self._is_quiet(time, victim, seconds))
            ended.quarantined = int(victim.lives.facts.get("quarantined", 0))
            ended.recovered = int(victim.lives.facts.get("recovered", 0))
            victim.leave()
        finally:
            victim.kill()
        self._judge(ended, folder, receiver, victim)
        if is_outbox_gone or may_be_silent:
            _forgive(ended.findings, is_outbox_gone, may_be_silent)
        return ended

    def _is_quiet(self, time: VirtualTime, victim: Victim, seconds: float) -> Callable[[], bool]:
        end = time.monotonic() + seconds
        return lambda: victim.is_up and time.monotonic() > end

    def _stage(
        self, folder: Path, facts: dict[str, object], *, does_answer: bool
    ) -> tuple[VirtualTime, MemoryBroker, Receiver, Victim]:
        time = VirtualTime()
        broker = MemoryBroker(time, session_queue_packets=10_000)
        receiver = Receiver(
            self._bench.template.keys,
            self._identity.device,
            self._identity.update_key.verify_key,
            time=time,
            broker=broker,
            does_answer=does_answer,
        )
        victim = Victim(
            self._nursery,
            lambda life, now: Begin("device", str(folder), now, life, facts),
            self._identity.device,
            time=time,
            broker=broker,
            read=lambda path: self._repository.read(path.lstrip("/")),
        )
        return time, broker, receiver, victim

    def _judge(self, ended: Ended, folder: Path, receiver: Receiver, victim: Victim) -> None:
        found, arrived = ended.findings, receiver.arrived
        found.made = len(self.owed)
        states, totals = read_outbox(folder)
        by_id = {each.update_id: each for each in self.owed}
        for update, bodies in arrived.bodies.items():
            if update not in by_id or bodies != {by_id[update].sha256}:
                found.altered += 1
                found.wrong(f"{update} arrived and is not what was made")
        missing = [each for each in self.owed if each.update_id not in arrived.bodies]
        ended.arrived = len(self.owed) - len(missing)
        ended.destroyed = totals.get("destroyed", 0)
        ended.told = sum("destroyed" in arrived.declined.get(each.order_id, "") for each in missing)
        if ended.destroyed < len(missing):
            found.lost += len(missing) - ended.destroyed
            gone = [f"{each.update_id} {states.get(each.update_id, 'nowhere')}" for each in missing]
            found.wrong(f"{len(missing)} did not arrive, {ended.destroyed} are counted as destroyed: {gone}")
        for update, state in states.items():
            if state not in ("stored", "destroyed"):
                found.wrong(f"{update} is {state} at the end")
        for facts in victim.lives.told:
            if "silent" in facts or not facts["release"]:
                found.wrong(f"no answer to an inference: {facts}")
                break
        for reason in victim.lives.reasons:
            found.wrong(f"it ended by itself: {reason}")
        for code in victim.lives.codes:
            if code not in (0, -9):
                found.wrong(f"it ended with code {code}")


def _forgive(found: Findings, is_outbox_gone: bool, may_be_silent: bool) -> None:
    """What follows from what was taken away."""
    if is_outbox_gone:
        found.lost = 0
        found.complaints = [each for each in found.complaints if "did not arrive" not in each]
    if may_be_silent:
        found.complaints = [each for each in found.complaints if not each.startswith("no answer")]


def read_outbox(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """State of each update, and the totals, as they lie on the disk."""
    with closing(sqlite3.connect(folder / DATABASE_NAME)) as reader:
        rows = reader.execute("SELECT hex(update_id), state FROM outbox").fetchall()
        totals = reader.execute("SELECT state, total FROM outbox_totals").fetchall()
    return {row[0].lower(): row[1] for row in rows}, dict(totals)
