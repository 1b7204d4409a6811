"""One process full of light agents: `python -m fleet.load.crowd`, told by one line of JSON what to be.

All its agents share one selector loop. Laws of the file: a line of its tally a second to standard output, and the last
one when it has left; it leaves when its standard input ends, so no crowd outlives who started it; connections are
opened so many at a time, and the next when one stands, so that the broker's pace is the ramp. Source:
docs/how-to/load.md.
"""

from __future__ import annotations

import functools
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edge_agent.enrolment.identity import Identity
from edge_agent.release.fetcher import HttpsFetcher
from edge_agent.release.tuf_client import check, clear_staging, download
from fleet.load.ledger import LedgerFile
from fleet.load.light_agent import Draft, Habits, LightAgent
from fleet.load.open_files import allow_open_files
from fleet.load.roll import Roll
from fleet.load.tally import Tally
from process.clock import SystemClock
from wire.errors import ShoalError
from wire.manifest import GRAPH_FILES
from wire.transport.mqtt import MqttTransport
from wire.transport.selector import SelectorLoop

_TELL_SECONDS = 1.0
_FETCHERS = 2
_QUEUE_PACKETS = 64
_RETRY_SECONDS = 2.0


class CrowdPlan(msgspec.Struct, kw_only=True, frozen=True):
    """What a process is to be.

    Attributes:
        roll: folder of the enrolled fleet.
        first, count: which of it.
        ledger: file that it writes.
        folder: for what samples fetch.
        host, port: of the broker; the rest is the identity's.
        is_tls: whether the broker is spoken to in TLS.
        dials: connections that are opened at a time.
        fetch_every: each agent whose number this divides fetches releases; 0 for none.
        cut_every: each agent whose number this divides loses its connection right after it sent its update; 0 for none.
    """

    roll: str
    first: int
    count: int
    ledger: str
    folder: str
    host: str
    port: int
    is_tls: bool
    draft: Draft
    habits: Habits
    seed: int = 0
    dials: int = 32
    fetch_every: int = 0
    cut_every: int = 0
    keepalive_seconds: int = 30
    stop_timeout_seconds: float = 20.0


class Crowd:
    """The agents of one process. `start`, then `stop`; everything else happens on the loop's thread."""

    def __init__(self, plan: CrowdPlan) -> None:
        self.tally = Tally()
        self._plan = plan
        self._loop = SelectorLoop("crowd")
        self._roll = Roll(Path(plan.roll))
        self._ledger = LedgerFile(Path(plan.ledger))
        self._waiting: Iterator[Identity] = self._roll.read(plan.first, plan.count)
        self._agents: list[LightAgent] = []
        self._fetcher = _Fetchers(self._roll, Path(plan.folder), self.tally, self._loop)

    @property
    def owed(self) -> int:
        """Updates of all agents that have no receipt."""
        return sum(agent.owed for agent in self._agents)

    def start(self) -> None:
        """Begins the ramp."""
        self._loop.start()
        for _ in range(self._plan.dials):
            self._loop.call_soon(self._next)

    def stop(self) -> None:
        """All leave politely; returns when they have."""
        left = threading.Event()
        self._loop.call_soon(lambda: self._leave(left))
        left.wait(self._plan.stop_timeout_seconds)
        until = time.monotonic() + self._plan.stop_timeout_seconds
        while self.tally.online and time.monotonic() < until:
            time.sleep(0.05)
        self._loop.stop()
        self._fetcher.stop()
        self._ledger.close()

    def _next(self) -> None:
        """The next agent of the roll comes; the one after it when this one is connected for the first time."""
        identity = next(self._waiting, None)
        if identity is None:
            return
        plan, number = self._plan, self._plan.first + len(self._agents)
        rng = random.Random(f"{plan.seed} {identity.device}")
        transport = MqttTransport(
            identity.device,
            plan.host,
            plan.port,
            loop=self._loop,
            tls=self._roll.tls_context(identity) if plan.is_tls else None,
            rng=rng,
            keepalive_seconds=plan.keepalive_seconds,
            queue_packets=_QUEUE_PACKETS,
            stop_timeout_seconds=plan.stop_timeout_seconds,
        )
        agent = LightAgent(
            identity,
            transport,
            draft=plan.draft,
            ledger=self._ledger,
            tally=self.tally,
            later=self._loop.call_later,
            rng=rng,
            habits=plan.habits,
            install=self._fetcher.ask if _is_one_of(plan.fetch_every, number) else None,
            cut=transport.drop if _is_one_of(plan.cut_every, number) else None,
            on_online=_Once(self._next),
            spread=transport.spread,
        )
        self._agents.append(agent)
        agent.start()

    def _leave(self, left: threading.Event) -> None:
        self._waiting = iter(())
        for agent in self._agents:
            agent.stop()
        left.set()


def _is_one_of(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


class _Once:
    """A call that is made the first time only."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


class _Fetchers:
    """Threads that bring releases as a device does: signed metadata and all files, over HTTPS, verified by TUF."""

    def __init__(self, roll: Roll, folder: Path, tally: Tally, loop: SelectorLoop) -> None:
        self._roll = roll
        self._folder = folder
        self._tally = tally
        self._loop = loop
        self._clock = SystemClock()
        self._asked: queue.SimpleQueue[tuple[LightAgent, int] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name="fetch", daemon=True) for _ in range(_FETCHERS)
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, agent: LightAgent, version: int) -> None:
        """See `light_agent.Install`."""
        self._asked.put((agent, version))

    def stop(self) -> None:
        """What is not begun is not fetched."""
        for _ in self._threads:
            self._asked.put(None)

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            agent, version = asked
            try:
                found = self._fetch(agent.identity, is_first=agent.release == 0)
            except ShoalError as error:
                self._loop.call_soon(functools.partial(self._failed, agent, version, str(error)))
            else:
                self._loop.call_soon(functools.partial(self._brought, agent, found))

    def _fetch(self, identity: Identity, *, is_first: bool) -> int:
        folder = self._folder / identity.device
        fetcher = HttpsFetcher(identity, context=self._roll.tls_context(identity))
        info = check(folder, identity.tuf_root, fetcher, identity.ring, self._clock)
        held = frozenset[str]() if is_first else frozenset(GRAPH_FILES)
        download(info, held=lambda _: held)
        clear_staging(folder)
        return info.release_version

    def _brought(self, agent: LightAgent, version: int) -> None:
        self._tally.fetched += 1
        agent.installed(version)

    def _failed(self, agent: LightAgent, version: int, reason: str) -> None:
        print(f"{agent.identity.device}: {reason}", file=sys.stderr)
        self._tally.fetches_failed += 1
        self._loop.call_later(_RETRY_SECONDS, functools.partial(self.ask, agent, version))


def main() -> int:
    """Reads the plan, plays it until standard input ends, and says once more what it did."""
    plan = msgspec.json.decode(sys.stdin.readline(), type=CrowdPlan)
    allow_open_files(plan.count)
    crowd = Crowd(plan)
    ended = threading.Event()
    threading.Thread(target=_hold, args=(ended,), name="leash", daemon=True).start()
    crowd.start()
    while not ended.wait(_TELL_SECONDS):
        _tell(crowd)
    crowd.stop()
    _tell(crowd)
    return 0


def _hold(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def _tell(crowd: Crowd) -> None:
    sys.stdout.write(msgspec.json.encode(crowd.tally).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
